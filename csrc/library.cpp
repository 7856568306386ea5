// Registers the operators on torch's stable ABI: one build serves torch 2.11 and later. Internal: fastvlm_loss checks
// the public arguments; here only what would read out of bounds is refused.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "finish.h"
#include "plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The arguments of an operator, in the order of its schema.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : at_(stack), end_(stack + count) {}
  template <typename T>
  T next() {
    STD_TORCH_CHECK(at_ < end_, "operator: its schema has too few arguments for this library");
    return torch::stable::detail::to<T>(*at_++);
  }
  void done() const { STD_TORCH_CHECK(at_ == end_, "operator: its schema has too many arguments for this library"); }

 private:
  StableIValue *at_, *const end_;
};

const int64_t* ids(const char* name, const Optional& t, int64_t length) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == length && t->is_contiguous(), name,
                  ": wanted a contiguous int64 tensor of ", length, " values");
  return static_cast<const int64_t*>(t->const_data_ptr());
}

// A contiguous float32 tensor of `length` values, or null.
const float* values(const char* name, const Optional& t, int64_t length) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == length && t->is_contiguous(), name,
                  ": wanted a contiguous float32 tensor of ", length, " values");
  return static_cast<const float*>(t->const_data_ptr());
}

float number(const char* name, const Optional& t) { return t ? *values(name, t, 1) : 0.f; }

fastvlm::Features features(const Tensor& x, const Tensor& y, ScalarType dtype, int64_t m, int64_t n, float scale,
                           bool layered = false) {
  const int64_t layers = layered && m ? x.size(0) / m : 1;
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && layers > 0 && x.size(0) == layers * m && y.size(0) == n &&
                      x.size(1) == y.size(1) && x.scalar_type() == dtype && y.scalar_type() == dtype &&
                      x.is_contiguous() && y.is_contiguous(),
                  "x, y: wanted contiguous [M, D] (a margin's: [C M, D]) and [N, D] of one dtype");
  return {x.const_data_ptr(), y.const_data_ptr(), x.size(1), scale, layers};
}

// The first 16 arguments of every operator, which stay alive with it.
struct Given {
  Tensor x, y, scale;
  Optional bias, target, row_id, col_id, row_factor, col_factor, teacher_x, teacher_y, teacher_scale, col_bias;
  Optional row_limit, col_limit, numbers;

  explicit Given(Arguments& a) : x(a.next<Tensor>()), y(a.next<Tensor>()), scale(a.next<Tensor>()) {
    for (Optional* t : {&bias, &target, &row_id, &col_id, &row_factor, &col_factor, &teacher_x, &teacher_y,
                        &teacher_scale, &col_bias, &row_limit, &col_limit, &numbers})
      *t = a.next<Optional>();
  }

  fastvlm::Problem problem(int64_t flags) const {
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: wanted float32 or bfloat16");
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "x, y: wanted contiguous [M, D] (a margin's: [C M, D]) and [N, D] of one dtype");
    STD_TORCH_CHECK(row_id.has_value() == col_id.has_value(), "row_id, col_id: wanted both or neither");
    fastvlm::Problem p{};
    p.type = dtype == ScalarType::Float ? fastvlm::Type::f32 : fastvlm::Type::bf16;
    p.m = x.size(0), p.n = y.size(0), p.flags = flags;
    p.first = features(x, y, dtype, p.m, p.n, number("scale", scale));
    if (flags & fastvlm::kSecond) {
      STD_TORCH_CHECK(teacher_x && teacher_y && teacher_scale, "teacher: wanted for these flags, got none");
      p.second = features(*teacher_x, *teacher_y, dtype, p.m, p.n, number("teacher_scale", teacher_scale),
                          flags & fastvlm::kMargin);
    }
    p.bias = number("bias", bias);
    p.target = ids("target", target, p.m);
    p.row_id = ids("row_id", row_id, p.m), p.col_id = ids("col_id", col_id, p.n);
    p.row_factor = values("row_factor", row_factor, p.m), p.col_factor = values("col_factor", col_factor, p.n);
    p.col_bias = values("col_bias", col_bias, p.n);
    if (flags & (fastvlm::kLimit | fastvlm::kGuide)) {
      p.row_limit = values("row_limit", row_limit, 2 * p.m), p.col_limit = values("col_limit", col_limit, 2 * p.n);
      STD_TORCH_CHECK(row_limit && col_limit, "row_limit, col_limit: wanted for these flags, got none");
    }
    if (const float* two = values("numbers", numbers, 2)) p.numbers[0] = two[0], p.numbers[1] = two[1];
    return p;
  }
};

// A new float32 tensor beside `like`; of no elements unless wanted.
Tensor empty(const Tensor& like, bool wanted, int64_t rows, int64_t cols) {
  return wanted ? torch::stable::new_empty(like, {rows, cols}) : torch::stable::new_empty(like, {0});
}

float* data(const Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }

template <typename... T>
void give(StableIValue* stack, const T&... outputs) {
  ((*stack++ = torch::stable::detail::from(outputs)), ...);
}

const fastvlm::Epilogue& epilogue(const std::string& name, const fastvlm::Problem& p) {
  const bool softmax = name == "softmax";
  STD_TORCH_CHECK(softmax || name == "hinge", "epilogue: got ", name, ", wanted softmax or hinge");
  const fastvlm::Epilogue* found = softmax ? fastvlm::core().softmax(p.flags) : fastvlm::core().hinge(p.flags);
  STD_TORCH_CHECK(found, "epilogue: got ", name, " with flags ", p.flags, ", wanted those of one statistic");
  const bool factors = !softmax || p.flags & fastvlm::kFactor;
  STD_TORCH_CHECK(!factors || (p.row_factor && p.col_factor) || !p.m || !p.n, "factors: got none, wanted both");
  return *found;
}

int64_t* wholes(const Tensor& t) { return t.numel() ? static_cast<int64_t*>(t.mutable_data_ptr()) : nullptr; }

// The operators "statistics" and "select", which has more arguments and outputs.
void fold(StableIValue* stack, uint64_t count, bool selects) {
  Arguments a(stack, count);
  const Given given(a);
  const Optional targets = a.next<Optional>();
  const auto name = a.next<std::string>();
  const auto flags = a.next<int64_t>();
  const bool keep = a.next<bool>(), alone = name == "candidates";
  auto p = given.problem(flags);
  const auto* how = alone ? nullptr : &epilogue(name, p);
  const int64_t n = p.length();
  fastvlm::Selection s{};
  Optional law, totals, place;
  if (selects) {
    s.k = a.next<int64_t>(), s.noise = a.next<bool>();
    law = a.next<Tensor>(), totals = a.next<Optional>(), place = a.next<Tensor>();
    STD_TORCH_CHECK(s.k > 0 && !(flags & fastvlm::kMargin), "select: wanted k > 0 and no margin");
    s.sharpness = values("law", law, 2)[0], s.floor = values("law", law, 2)[1];
    s.totals = values("totals", totals, n);
    const int64_t* at = ids("place", place, 4);
    s.seed = at[0], s.step = at[1], s.first_row = at[2], s.first_col = at[3];
  }
  a.done();
  Tensor state = torch::stable::new_empty(given.scale, {how ? how->fields : 0, n});
  Tensor products = empty(given.scale, keep, p.m, p.n);
  Tensor nll = torch::stable::new_empty(given.scale, {how ? n : 0});
  Tensor gap = torch::stable::new_empty(given.scale, {flags & fastvlm::kGap ? n : 0});
  Tensor order = torch::stable::new_empty(given.scale, {selects ? n : 0, s.k}, ScalarType::Long);
  Tensor best = torch::stable::new_empty(given.scale, {selects ? n : 0, s.k});
  p.products = data(products), s.order = wholes(order), s.best = data(best);
  fastvlm::statistics(p, how, data(state), selects ? &s : nullptr);
  const fastvlm::Ends ends{p, data(state), values("targets", targets, n)};
  if (name == "hinge")
    fastvlm::hinge_finish(ends, data(nll));
  else if (how)
    fastvlm::softmax_finish(ends, data(nll), data(gap));
  if (selects)
    give(stack, nll, gap, state, products, order, best);
  else
    give(stack, nll, gap, state, products);
}

void statistics(StableIValue* stack, uint64_t count, uint64_t) { fold(stack, count, false); }
void select(StableIValue* stack, uint64_t count, uint64_t) { fold(stack, count, true); }

// What is asked of a gradient: x and y or neither, of how many first rows and columns (-1: all).
struct Needs {
  bool x, y, scale, col;
  int64_t rows = -1, cols = -1;

  void first(Arguments& a, const fastvlm::Problem& p) {
    rows = a.next<int64_t>(), cols = a.next<int64_t>();
    STD_TORCH_CHECK(rows <= p.m && cols <= p.n, "rows, cols: wanted at most M and N, or -1");
    rows = rows < 0 ? p.m : rows, cols = cols < 0 ? p.n : cols;
  }
};

struct NewGradients {
  const Needs& needs;
  Tensor x, y, col;
  NewGradients(const Given& given, const fastvlm::Problem& p, const Needs& n)
      : needs(n), x(empty(given.x, n.x, n.rows, p.first.d)), y(empty(given.y, n.y, n.cols, p.first.d)),
        col(torch::stable::new_empty(given.scale, {n.col ? p.n : 0})) {}
  fastvlm::Gradients to() const {
    return {x.numel() ? x.mutable_data_ptr() : nullptr, y.numel() ? y.mutable_data_ptr() : nullptr,
            needs.rows, needs.cols, data(col)};
  }
};

Tensor scalar(const Tensor& like, double value) {
  Tensor t = torch::stable::new_empty(like, {});
  *data(t) = static_cast<float>(value);
  return t;
}

void gradient(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments a(stack, count);
  const Given given(a);
  const Optional targets = a.next<Optional>();
  const auto state = a.next<Tensor>(), products = a.next<Tensor>(), d_nll = a.next<Tensor>();
  const Optional d_gap = a.next<Optional>();
  const auto name = a.next<std::string>();
  const auto flags = a.next<int64_t>();
  Needs needs{a.next<bool>(), a.next<bool>(), a.next<bool>(), a.next<bool>()};
  auto p = given.problem(flags);
  needs.first(a, p);
  a.done();
  const auto& how = epilogue(name, p);
  const int64_t n = p.length();
  STD_TORCH_CHECK(products.numel() == 0 || products.numel() == p.m * p.n, "products: wanted [M, N], or nothing");
  STD_TORCH_CHECK(!(flags & fastvlm::kGap) != d_gap.has_value(), "d_gap: wanted with the gap flag, and only then");
  if (products.numel()) p.products = const_cast<float*>(values("products", products, products.numel()));
  const fastvlm::Ends ends{p, values("state", state, how.fields * n), values("targets", targets, n)};
  Tensor operands = torch::stable::new_empty(given.scale, {how.operands, n});
  bool any = true;
  if (name == "hinge")
    any = fastvlm::hinge_operands(ends, values("d_nll", d_nll, n), data(operands));
  else
    fastvlm::softmax_operands(ends, values("d_nll", d_nll, n), values("d_gap", d_gap, n), data(operands));
  const NewGradients d(given, p, needs);
  fastvlm::Sums sums;
  if (any)
    sums = fastvlm::gradient(p, how, data(operands), d.to());
  else  // a mean over no active hinge
    fastvlm::no_gradient(p, d.to());
  give(stack, d.x, d.y, scalar(given.scale, sums.gc), scalar(given.scale, sums.g), d.col);
}

void sigmoid_sweep(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments a(stack, count);
  const Given given(a);
  Needs needs{a.next<bool>(), a.next<bool>(), a.next<bool>(), false};
  const auto p = given.problem(fastvlm::kPositive);
  needs.first(a, p);
  a.done();
  const NewGradients d(given, p, needs);
  const fastvlm::Sums sums = fastvlm::sigmoid_sweep(p, needs.x || needs.y || needs.scale, d.to());
  const Tensor& like = given.scale;
  give(stack, scalar(like, sums.loss), d.x, d.y, scalar(like, sums.gc), scalar(like, sums.g));
}

std::string instruction_set() { return fastvlm::core().name; }

}  // namespace

// The schemas and fakes stand in fastvlm_loss/engine/ops.py.
STABLE_TORCH_LIBRARY_IMPL(fastvlm_loss, CPU, m) {
  m.impl("statistics.cpp", &statistics);
  m.impl("select.cpp", &select);
  m.impl("gradient.cpp", &gradient);
  m.impl("sweep.cpp", &sigmoid_sweep);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_loss, m) { m.def("instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastvlm_loss, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
