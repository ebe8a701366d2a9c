// The few PyTorch operators that the C++ paths call, through the stable ABI. Operators with a Scalar argument cannot go
// through the stable dispatcher; addmm has a C function for each device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace cce::torch_api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls aten::name.overload with args and returns its first result. Argument and result handles are owned by the stack.
template <typename... Args>
Tensor call(const char* name, const char* overload, Args&&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// An uninitialised contiguous tensor on the device of `like`. By the C function: torch::stable::new_empty finds its operator by
// name each time, and a step of the sparse gradient makes some seventy tensors.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), type, device,
                                                         like.get_device_index(), &result));
  return Tensor(result);
}
inline Tensor zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, std::make_optional(dtype));
}
inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, std::make_optional(dtype));
}
inline Tensor rows(const Tensor& t, int64_t begin, int64_t count) {
  Tensor source = t;
  return torch::stable::narrow(source, 0, begin, count);
}
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
inline Tensor index_rows(const Tensor& t, const Tensor& index) {
  return call("aten::index_select", "", t, int64_t{0}, index);
}
// to[index] = from, by rows
inline void index_copy_rows(const Tensor& to, const Tensor& index, const Tensor& from) {
  call("aten::index_copy_", "", to, int64_t{0}, index, from);
}
// out = a b
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  call("aten::mm", "out", a, b, out);
}
// out += a b, on the CPU
inline void cpu_addmm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace cce::torch_api
