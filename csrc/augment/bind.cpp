// fusereg._C: augmentation.
#include "core/tensor.h"

namespace fusereg::augment {

void bind_params(py::module_& m);

void bind(py::module_& m) { bind_params(m); }

}  // namespace fusereg::augment
