// The options of a statistic as one number: same names and values as fastvlm_loss/scores/flags.py.
#pragma once
#include <cstdint>

namespace fastvlm {

enum Flags : int64_t {
  kRows = 1,
  kCols = 2,
  kGap = 4,
  kTeacher = 8,
  kFactor = 16,
  kHardest = 32,
  kPositive = 128,
  kInside = 256,
  kHardness = 512,
  kSwapped = 1024,
  kLimit = 2048,
  kGuide = 4096,
  kMargin = 8192,
  kDetached = 16384,
};
// what changes the numbers of a state; the rest says which entries there are
constexpr int64_t kKinds = kGap | kTeacher | kFactor | kInside | kHardness | kSwapped;
constexpr int64_t kSecond = kTeacher | kGuide | kMargin;  // a second product is needed

constexpr float kNats = 0.69314718055994531f, kBits = 1.44269504088896341f;  // a bit in nats, a nat in bits

}  // namespace fastvlm
