// Parallel loops on torch's own threads, and 64-byte aligned buffers.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

namespace fastvlm {

// f(i) for every i; each thread takes one contiguous range.
template <class F>
void parallel(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Uninitialised storage that grows and never shrinks; a thread_local one serves all tasks of its thread.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) { at<char>(bytes); }
  template <typename T>
  T* at(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    if (bytes > size_) {
      data_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
#ifdef FASTVLM_POISON
      std::memset(data_.get(), 0xff, bytes);  // NaN: a read before a write must not go unnoticed
#endif
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace fastvlm
