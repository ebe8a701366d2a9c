#include <cstdlib>
#include <cstring>

#include "cuda/backend.h"
#include "cuda/sm80/backend.h"
#if CCE_HAS_SM90
#include "cuda/sm90/backend.h"
#endif

namespace cce::cuda {

const std::vector<Backend>& backends() {
  static const std::vector<Backend> table = {
#if CCE_HAS_SM90
      // Lists of exact rows are short or rare: the portable kernel serves them here too.
      {"sm90", sm90::block_n, true, true, sm90::unsupported, sm90::forward_rounds, sm90::forward,
       sm90::backward, sm80::exact_rows},
#endif
      {"sm80", sm80::block_n, false, false, sm80::unsupported, sm80::forward_rounds, sm80::forward,
       sm80::backward, sm80::exact_rows},
  };
  return table;
}

Choice choose_backend() {
  const char* forced = std::getenv("CCE_BACKEND");
  Choice choice;
  for (const Backend& backend : backends()) {
    std::string reason;
    if (forced && *forced && std::strcmp(forced, backend.name) != 0) {
      reason = std::string(backend.name) + ": CCE_BACKEND asks for " + forced;
    } else {
      reason = backend.unsupported();
    }
    if (reason.empty()) {
      choice.backend = &backend;
      return choice;
    }
    choice.reasons += (choice.reasons.empty() ? "" : "\n") + reason;
  }
  return choice;
}

}  // namespace cce::cuda
