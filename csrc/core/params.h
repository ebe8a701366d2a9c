// What a call asks for, in plain numbers: no torch, no CUDA. Every path (CPU, sm80, sm90) reads these structs.
#pragma once

#include <cstdint>

namespace cce::core {

// The loss, as the user chose it. Doubles, so that the fp64 CPU path loses nothing.
struct LossOptions {
  double softcap = 0.0;  // 0: none
  double logit_scale = 1.0;
  double label_smoothing = 0.0;  // epsilon of the smoothed target distribution
  int64_t ignore_index = -100;
  int64_t vocab_start = 0;  // global id of the classifier's first row (vocabulary-parallel shards)
  int64_t vocab_total = 0;  // size of the whole vocabulary, at least the shard's
};

// Where a target points. `kElsewhere` is a valid target that another vocabulary shard holds.
enum class TargetKind : int { kIgnored, kHere, kElsewhere, kInvalid };

}  // namespace cce::core
