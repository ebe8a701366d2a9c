// From op arguments to checked shapes and plain parameters. The user-facing checks, with friendlier messages, are in
// cce_ext/checks; these protect callers of the raw ops, whatever the device.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "core/params.h"
#include "torch/aten.h"

namespace cce::torch_api {

// The inputs that forward and backward share. Sizes: N rows, V vocabulary ids of this shard, D hidden, R low rank.
struct Inputs {
  Tensor e;                      // (N, D)
  Tensor c;                      // (V, D)
  Tensor targets;                // (N,) int64, contiguous
  std::optional<Tensor> bias;    // (V,)
  std::optional<Tensor> u;       // (N, R)
  std::optional<Tensor> lora_b;  // (V, R)
  core::LossOptions options;
  int64_t n = 0, v = 0, d = 0, r = 0;
};

// fp64 inputs are computed in fp64, all others in fp32.
inline ScalarType accumulate_type(const Tensor& e) {
  return e.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Double || t == ScalarType::Float || t == ScalarType::BFloat16 ||
         t == ScalarType::Half;
}

inline void check_same_device(const Tensor& t, const Tensor& e, const char* name) {
  STD_TORCH_CHECK(t.device() == e.device(), name, " is on another device than e");
}

inline Inputs make_inputs(const Tensor& e, const Tensor& c, const Tensor& targets,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& u,
                          const std::optional<Tensor>& lora_b, core::LossOptions options) {
  STD_TORCH_CHECK(e.dim() == 2, "e must have shape (N, D), got ", e.dim(), " dimensions");
  STD_TORCH_CHECK(c.dim() == 2, "c must have shape (V, D), got ", c.dim(), " dimensions");
  STD_TORCH_CHECK(targets.dim() == 1, "targets must have shape (N,), got ", targets.dim(),
                  " dimensions");
  Inputs in{e, c, targets, bias, u, lora_b, options};
  in.n = e.size(0);
  in.d = e.size(1);
  in.v = c.size(0);
  STD_TORCH_CHECK(c.size(1) == in.d, "c has ", c.size(1), " columns, e has ", in.d);
  STD_TORCH_CHECK(targets.size(0) == in.n, "targets has ", targets.size(0), " rows, e has ", in.n);
  STD_TORCH_CHECK(c.scalar_type() == e.scalar_type(), "c must have the dtype of e");
  STD_TORCH_CHECK(!is_floating(targets.scalar_type()), "targets must be integers");
  check_same_device(c, e, "c");
  check_same_device(targets, e, "targets");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == in.v, "bias must have shape (V,) = (",
                    in.v, ",)");
    STD_TORCH_CHECK(is_floating(bias->scalar_type()), "bias must be floating point");
    check_same_device(*bias, e, "bias");
  }
  STD_TORCH_CHECK(u.has_value() == lora_b.has_value(), "u and lora_b must be given together");
  if (u) {
    in.r = u->dim() == 2 ? u->size(1) : -1;
    STD_TORCH_CHECK(in.r >= 0 && u->size(0) == in.n, "u must have shape (N, R) with N = ", in.n);
    STD_TORCH_CHECK(lora_b->dim() == 2 && lora_b->size(0) == in.v && lora_b->size(1) == in.r,
                    "lora_b must have shape (V, R) = (", in.v, ", ", in.r, ")");
    STD_TORCH_CHECK(u->scalar_type() == e.scalar_type(), "u must have the dtype of e");
    STD_TORCH_CHECK(is_floating(lora_b->scalar_type()), "lora_b must be floating point");
    check_same_device(*u, e, "u");
    check_same_device(*lora_b, e, "lora_b");
    if (in.r == 0) in.u = in.lora_b = std::nullopt;
  }
  if (in.options.vocab_total <= 0) in.options.vocab_total = in.options.vocab_start + in.v;
  STD_TORCH_CHECK(
      in.options.vocab_start >= 0 && in.options.vocab_start + in.v <= in.options.vocab_total,
      "vocab_start + V must not exceed vocab_total");
  in.targets = torch::stable::contiguous(cast(targets, ScalarType::Long));
  return in;
}

// The result for a gradient that was not asked for.
inline Tensor no_gradient(const Tensor& like, ScalarType dtype) { return empty(like, {0}, dtype); }

// What the two ops return; see the schemas in library.cpp.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace cce::torch_api
