#include <map>
#include <utility>

#include "core/launch_tables_python.h"
#include "core/tensor.h"

namespace fusereg {
namespace {

class PythonTables final : public LaunchTables {
 public:
  explicit PythonTables(py::object allocate) : allocate_(std::move(allocate)) {}

  TableMemory& reserve(int device, void* stream, std::size_t bytes) override {
    const auto key = std::make_pair(device, stream);
    const auto found = tables_.find(key);
    if (found != tables_.end() && found->second.memory.bytes >= bytes) return found->second.memory;
    // Somewhat more, since parameters may yet get their first gradient.
    const std::size_t wanted = bytes + bytes / 4;
    py::object tensor = allocate_(device, wanted);
    Owned owned;
    owned.memory.data = memory_argument(tensor, static_cast<std::int64_t>(wanted),
                                        device_of(device), "launch_tables", "memory");
    owned.memory.bytes = wanted;
    owned.tensor = std::move(tensor);
    return (tables_[key] = std::move(owned)).memory;
  }

 private:
  // The tensor is what keeps others out of the memory while it is trusted to hold what was written.
  struct Owned {
    TableMemory memory;
    py::object tensor;
  };

  static Device device_of(int index) {
#if defined(FUSEREG_HOST_IS_DEVICE)
    return {kDLCPU, index};
#else
    return {kDLCUDA, index};
#endif
  }

  py::object allocate_;
  std::map<std::pair<int, void*>, Owned> tables_;
};

}  // namespace

void bind_launch_tables(py::module_& m) {
  py::class_<PythonTables> type(m, "_LaunchTables");
  type.doc() = "Memory for the tables of CUDA launches over long lists of tensors.";
  m.def(
      "launch_tables",
      [](const py::object& allocate) {
        if (PyCallable_Check(allocate.ptr()) == 0) {
          throw py::type_error("fusereg.launch_tables: allocate must be callable, got " +
                               type_name(allocate));
        }
        return std::make_unique<PythonTables>(allocate);
      },
      py::arg("allocate"));
}

LaunchTables* launch_tables_argument(py::handle object, const char* op, const char* name) {
  if (object.is_none()) return nullptr;
  if (py::isinstance<PythonTables>(object)) return object.cast<PythonTables*>();
  throw py::type_error(std::string("fusereg.") + op + ": " + name +
                       " must come from launch_tables() or be None, got " + type_name(object));
}

}  // namespace fusereg
