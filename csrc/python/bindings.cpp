// pybind11: what is host-side and stateful. Tensors never pass here, so one build of this module
// serves every torch release.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "kvcache/block_pool.h"
#include "kvcache/cache_table.h"

namespace py = pybind11;

namespace {

// BlockPoolExhausted carries its counts, so that a scheduler can decide whom to evict.
void bind_block_pool_exhausted(py::module_& m) {
  static PyObject* type = PyErr_NewExceptionWithDoc(
      "torch_winnow.kvcache.BlockPoolExhausted",
      "A pool has too few free blocks for an operation, which has changed nothing.\n\n"
      "Attributes:\n"
      "    needed: blocks that the operation needs.\n"
      "    free: blocks that are free.\n"
      "    total: blocks of the pool.\n",
      PyExc_RuntimeError, nullptr);
  if (!type) throw py::error_already_set();
  m.attr("BlockPoolExhausted") = py::reinterpret_borrow<py::object>(type);
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const winnow::BlockPoolExhausted& e) {
      py::object error = py::reinterpret_borrow<py::object>(type)(e.what());
      error.attr("needed") = e.needed;
      error.attr("free") = e.free;
      error.attr("total") = e.total;
      PyErr_SetObject(type, error.ptr());
    }
  });
}

// Tensors pass as addresses: Python has checked their dtype and shape and keeps them alive.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A pool's own methods are called with its lock; tables take it themselves.
template <typename Result, typename... Args>
auto locked(Result (winnow::BlockPool::*method)(Args...)) {
  return [method](winnow::BlockPool& pool, Args... args) -> Result {
    const auto lock = pool.lock();
    return (pool.*method)(args...);
  };
}

template <typename Result, typename... Args>
auto locked(Result (winnow::BlockPool::*method)(Args...) const) {
  return [method](winnow::BlockPool& pool, Args... args) -> Result {
    const auto lock = pool.lock();
    return (pool.*method)(args...);
  };
}

void bind_kvcache(py::module_& m) {
  using winnow::BlockPool;
  using winnow::CacheTable;
  // What walks through whole tables lets other threads run; an append is over sooner than that.
  using Released = py::call_guard<py::gil_scoped_release>;
  bind_block_pool_exhausted(m);
  py::class_<BlockPool, std::shared_ptr<BlockPool>>(m, "BlockPool")
      .def(py::init<int64_t>(), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", locked(&BlockPool::num_blocks))
      .def_property_readonly("num_free", locked(&BlockPool::num_free))
      .def_property_readonly("num_evictable", locked(&BlockPool::num_evictable))
      .def("grow", locked(&BlockPool::grow), py::arg("num_blocks"))
      .def("allocate", locked(&BlockPool::allocate))
      .def("retain", locked(&BlockPool::retain), py::arg("block"))
      .def("release", locked(&BlockPool::release), py::arg("block"))
      .def("owners", locked(&BlockPool::owners), py::arg("block"));
  py::class_<CacheTable>(m, "CacheTable")
      .def(py::init<std::shared_ptr<BlockPool>, int64_t, int64_t, int64_t>(), py::arg("pool"),
           py::arg("rows"), py::arg("layers"), py::arg("block_size"))
      .def_property_readonly("width", &CacheTable::width)
      .def("attach",
           [](CacheTable& table, uintptr_t blocks, int64_t capacity, uintptr_t lengths) {
             table.attach(pointer<int32_t>(blocks), capacity, pointer<int32_t>(lengths));
           })
      .def("append",
           [](CacheTable& table, int64_t layer, int64_t tokens,
              const std::optional<CacheTable::Integers>& lengths, uintptr_t positions) {
             const int64_t width = table.width();
             table.append(layer, tokens, lengths ? &*lengths : nullptr,
                          pointer<int64_t>(positions));
             return (table.copies().empty() ? 0 : 1) + (table.width() == width ? 0 : 2) +
                    (table.fresh().empty() ? 0 : 4) + (table.changed() ? 8 : 0);
           })
      .def(
          "write",
          [](CacheTable& table, int64_t layer, int64_t tokens, uintptr_t positions, bool absent) {
            table.write(layer, tokens, pointer<const int64_t>(positions), absent);
            return !table.copies().empty();
          },
          py::arg("layer"), py::arg("tokens"), py::arg("positions"), py::arg("absent") = false)
      .def("even", &CacheTable::even)
      .def("copies",
           [](const CacheTable& table) {
             py::list sources;
             py::list targets;
             for (const CacheTable::Copy& copy : table.copies()) {
               sources.append(copy.source);
               targets.append(copy.target);
             }
             return py::make_tuple(sources, targets);
           })
      .def_property_readonly("fresh", &CacheTable::fresh)
      .def("fork", &CacheTable::fork, Released())
      .def("permute", &CacheTable::permute, Released())
      .def("truncate", &CacheTable::truncate, Released())
      .def("free", &CacheTable::free, Released())
      .def("register_prefix", &CacheTable::register_prefix, Released())
      .def("match_prefix", &CacheTable::match_prefix, Released())
      .def("retained", &CacheTable::retained, Released())
      .def(
          "marginal",
          [](const CacheTable& table, const std::optional<CacheTable::Integers>& kept) {
            return table.marginal(kept ? &*kept : nullptr);
          },
          Released());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Host-side objects of torch_winnow: block bookkeeping, and how it was built.";
  m.def("build", [] {
    py::dict info;
    info["version"] = WINNOW_VERSION;
    info["torch"] = WINNOW_TORCH_VERSION;
    info["compiler"] = WINNOW_COMPILER;
    info["capabilities"] = WINNOW_CAPABILITIES;
    return info;
  });
  bind_kvcache(m);
}
