// Registers the operators on torch's stable ABI: one build serves torch 2.11 and later. Internal: fastvlm_loss checks
// the public arguments; here only what would read out of bounds is refused.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "finish.h"
#include "plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const int64_t* ids(const char* name, const Optional& t, int64_t length) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == length && t->is_contiguous(), name,
                  ": wanted a contiguous int64 tensor of ", length, " values");
  return static_cast<const int64_t*>(t->const_data_ptr());
}

float number(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == 1, name, ": wanted one float32 value");
  return *static_cast<const float*>(t.const_data_ptr());
}

fastvlm::Problem problem(const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& bias,
                         const Optional& target, const Optional& row_id, const Optional& col_id) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: wanted float32 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && y.scalar_type() == dtype &&
                      x.is_contiguous() && y.is_contiguous(),
                  "x, y: wanted contiguous [M, D] and [N, D] of one dtype");
  STD_TORCH_CHECK(row_id.has_value() == col_id.has_value(), "row_id, col_id: wanted both or neither");
  fastvlm::Problem p{};
  p.x = x.const_data_ptr(), p.y = y.const_data_ptr();
  p.type = dtype == ScalarType::Float ? fastvlm::Type::f32 : fastvlm::Type::bf16;
  p.m = x.size(0), p.n = y.size(0), p.d = x.size(1);
  p.scale = number("scale", scale), p.bias = bias ? number("bias", *bias) : 0.f;
  p.target = ids("target", target, p.m);
  p.row_id = ids("row_id", row_id, p.m);
  p.col_id = ids("col_id", col_id, p.n);
  return p;
}

// What the schema has for other backends only.
void none(std::initializer_list<const Optional*> tensors) {
  for (const Optional* t : tensors)
    STD_TORCH_CHECK(!t->has_value(), "factors, teacher: got one, wanted none");
}

void known(const std::string& epilogue) {
  STD_TORCH_CHECK(epilogue == "softmax", "epilogue: got ", epilogue, ", wanted softmax");
}

// [rows, cols] beside `like`, or nothing.
Tensor empty(const Tensor& like, bool wanted, int64_t rows, int64_t cols) {
  return wanted ? torch::stable::new_empty(like, {rows, cols}) : torch::stable::new_empty(like, {0});
}

int64_t length(const fastvlm::Problem& p, int64_t flags) {
  return (flags & fastvlm::kRows ? p.m : 0) + (flags & fastvlm::kCols ? p.n : 0);
}

// A contiguous float32 vector of `length` values, or null.
const float* values(const char* name, const Optional& t, int64_t length) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == length && t->is_contiguous(), name,
                  ": wanted a contiguous float32 tensor of ", length, " values");
  return static_cast<const float*>(t->const_data_ptr());
}

float* data(const Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_statistics(const Tensor& x, const Tensor& y, const Tensor& scale,
                                                              const Optional& bias, const Optional& target,
                                                              const Optional& row_id, const Optional& col_id,
                                                              const Optional& row_factor, const Optional& col_factor,
                                                              const Optional& teacher_x, const Optional& teacher_y,
                                                              const Optional& teacher_scale, const Optional& col_bias, const Optional& row_limit, const Optional& col_limit,
    const Optional& numbers, const Optional& targets,
                                                              std::string epilogue, int64_t flags, bool keep) {
  known(epilogue);
  none({&row_factor, &col_factor, &teacher_x, &teacher_y, &teacher_scale, &col_bias, &row_limit, &col_limit, &numbers});
  auto p = problem(x, y, scale, bias, target, row_id, col_id);
  const bool gap = flags & fastvlm::kGap;
  const int64_t n = length(p, flags);
  Tensor state = torch::stable::new_empty(scale, {gap ? 5 : 3, n}), products = empty(scale, keep, p.m, p.n);
  Tensor nll = torch::stable::new_empty(scale, {n}), gaps = torch::stable::new_empty(scale, {gap ? n : 0});
  p.products = data(products);
  fastvlm::softmax_statistics(p, flags, static_cast<float*>(state.mutable_data_ptr()));
  fastvlm::softmax_finish(data(state), values("targets", targets, n), n, data(nll), data(gaps));
  fastvlm::softmax_settle(data(state), n, gap);
  return {nll, gaps, state, products};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_gradient(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& bias, const Optional& target,
    const Optional& row_id, const Optional& col_id, const Optional& row_factor, const Optional& col_factor,
    const Optional& teacher_x, const Optional& teacher_y, const Optional& teacher_scale, const Optional& col_bias, const Optional& row_limit, const Optional& col_limit,
    const Optional& numbers, const Optional& targets,
    const Tensor& state, const Tensor& products, const Tensor& d_nll, const Optional& d_gap, std::string epilogue,
    int64_t flags, bool need_x, bool need_y, bool /*need_scale: always*/, bool /*need_col: no col_bias*/) {
  known(epilogue);
  none({&row_factor, &col_factor, &teacher_x, &teacher_y, &teacher_scale, &col_bias, &row_limit, &col_limit, &numbers});
  auto p = problem(x, y, scale, bias, target, row_id, col_id);
  const bool gap = flags & fastvlm::kGap;
  const int64_t n = length(p, flags);
  STD_TORCH_CHECK(products.numel() == 0 || products.numel() == p.m * p.n, "products: wanted [M, N], or nothing");
  STD_TORCH_CHECK(gap == d_gap.has_value(), "d_gap: wanted with the gap flag, and only then");
  p.products = const_cast<float*>(values("products", products, products.numel()));
  if (!products.numel()) p.products = nullptr;
  Tensor operands = torch::stable::new_empty(scale, {gap ? 4 : 3, n});
  fastvlm::softmax_operands(values("state", state, (gap ? 5 : 3) * n), values("targets", targets, n),
                            values("d_nll", d_nll, n), values("d_gap", d_gap, n), n, data(operands));
  Tensor dx = empty(x, need_x, p.m, p.d), dy = empty(y, need_y, p.n, p.d);
  Tensor d_scale = torch::stable::new_empty(scale, {}), d_bias = torch::stable::new_empty(scale, {});
  const fastvlm::Sums sums = fastvlm::softmax_gradient(p, flags, data(operands), need_x ? dx.mutable_data_ptr() : nullptr,
                                                       need_y ? dy.mutable_data_ptr() : nullptr);
  *data(d_scale) = static_cast<float>(sums.gc);
  *data(d_bias) = static_cast<float>(sums.g);
  return {dx, dy, d_scale, d_bias, empty(scale, false, 0, 0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_sweep(
    const Tensor& x, const Tensor& y, const Tensor& scale, const Optional& bias, const Optional& target,
    const Optional& row_id, const Optional& col_id, const Optional& row_factor, const Optional& col_factor,
    const Optional& teacher_x, const Optional& teacher_y, const Optional& teacher_scale, const Optional& col_bias, const Optional& row_limit, const Optional& col_limit,
    const Optional& numbers, bool need_x, bool need_y,
    bool need_scale) {
  none({&teacher_x, &teacher_y, &teacher_scale, &col_bias, &row_limit, &col_limit, &numbers});
  auto p = problem(x, y, scale, bias, target, row_id, col_id);
  Tensor dx = empty(x, need_x, p.m, p.d), dy = empty(y, need_y, p.n, p.d), total = torch::stable::new_empty(scale, {});
  Tensor d_scale = torch::stable::new_empty(scale, {}), d_bias = torch::stable::new_empty(scale, {});
  const fastvlm::Sums sums = fastvlm::sigmoid_sweep(
      p, values("row_factor", row_factor, p.m), values("col_factor", col_factor, p.n), need_x || need_y || need_scale,
      need_x ? dx.mutable_data_ptr() : nullptr, need_y ? dy.mutable_data_ptr() : nullptr);
  *data(total) = static_cast<float>(sums.loss);
  *data(d_scale) = static_cast<float>(sums.gc);
  *data(d_bias) = static_cast<float>(sums.g);
  return {total, dx, dy, d_scale, d_bias};
}

std::string instruction_set() { return fastvlm::core().name; }

}  // namespace

// The schemas and fakes stand in fastvlm_loss/engine/ops.py.
STABLE_TORCH_LIBRARY_IMPL(fastvlm_loss, CPU, m) {
  m.impl("statistics.cpp", TORCH_BOX(&softmax_statistics));
  m.impl("gradient.cpp", TORCH_BOX(&softmax_gradient));
  m.impl("sweep.cpp", TORCH_BOX(&sigmoid_sweep));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastvlm_loss, m) { m.def("instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastvlm_loss, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
