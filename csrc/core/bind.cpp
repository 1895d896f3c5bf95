// The Python interface of the core, one for all backends. _core_cpu, _core_metal and _core_cuda compile this file, and
// _core.pyi types them all.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <iterator>
#include <new>
#include <optional>
#include <system_error>

#include "core/bind.h"
#include "core/device.h"
#include "core/gil.h"
#include "core/interrupt.h"
#include "core/plan.h"
#include "core/steps.h"

// If pybind11 has no memory for a Python object, it frees the C++ object too, although a shared pointer owns it.
#define OWNED_BY_POINTER(T)                                                                                            \
    template <>                                                                                                        \
    struct pybind11::detail::has_operator_delete<T> : std::true_type {};                                               \
    template <>                                                                                                        \
    inline void pybind11::detail::call_operator_delete<T, 0>(T*, size_t, size_t) {}
OWNED_BY_POINTER(zinc::Buffer)
OWNED_BY_POINTER(zinc::Device)
OWNED_BY_POINTER(zinc::Plan)

namespace py = pybind11;
using namespace zinc;

namespace {

using PyBinding = std::tuple<std::shared_ptr<Buffer>, uint64_t, uint64_t>;
using PyDispatch = std::tuple<std::string, py::bytes, std::vector<PyBinding>, std::array<uint32_t, 3>, uint32_t, bool>;

// (kernel, params, [(buffer, offset, nbytes)], grid, threads, barrier) -> Dispatch without its pipeline
Dispatch to_dispatch(const PyDispatch& from) {
    const auto& [kernel, params, bindings, grid, threads, barrier] = from;
    Dispatch d;
    const auto bytes = std::string_view(params);
    d.params.assign(bytes.begin(), bytes.end());
    for (const auto& [buffer, offset, nbytes] : bindings) {
        if (!buffer) throw UsageError(kernel + ": a binding has no buffer");
        d.bindings.push_back({buffer, offset, nbytes});
    }
    std::copy(grid.begin(), grid.end(), d.grid);
    d.threads = threads;
    d.barrier = barrier;
    return d;
}

std::vector<Dispatch> to_dispatches(Device& device, const std::vector<PyDispatch>& from) {
    device.process.check();
    std::vector<Dispatch> out;
    out.reserve(from.size());
    for (const auto& d : from) out.push_back(to_dispatch(d));
    std::vector<std::string> kernels;
    for (const auto& d : from) kernels.push_back(std::get<0>(d));
    const Unlocked unlocked;  // a pipeline may have to be compiled
    device.prepare(kernels);
    for (size_t i = 0; i < from.size(); i++) out[i].pipeline = device.pipeline(kernels[i]);
    return out;
}

void check_captures(const Device& device) {
    device.process.check();
    if (!device.captures())
        throw UsageError(device.info().backend + " records no GPU traces; capture with device=\"metal\"");
}

// The memory of a Python buffer, which must be contiguous.
py::buffer_info contiguous(const py::buffer& owner, const char* who) {
    py::buffer_info view = owner.request();
    if (!PyBuffer_IsContiguous(view.view(), 'C')) throw UsageError(std::string(who) + ": the data must be contiguous");
    return view;
}

// The damage of a map of zincmetal._host.
const FileDamage* damage_of(const py::buffer& owner) {
    if (!py::hasattr(owner, "_damage")) return nullptr;
    const py::object capsule = owner.attr("_damage");
    return static_cast<const FileDamage*>(PyCapsule_GetPointer(capsule.ptr(), FILE_DAMAGE));
}

// Wraps the memory of a Python buffer (a mapped file) from offset on, without a copy. Rounds the end up to a page.
// The view keeps the owner's memory alive as long as a plan holds the buffer.
std::shared_ptr<Buffer> wrap(Device& device, const py::buffer& owner, size_t offset, size_t nbytes) {
    device.process.check();
    struct Held {
        py::buffer_info view;
        std::shared_ptr<Buffer> buffer;
    };
    auto held = std::make_unique<Held>(Held{contiguous(owner, "wrap"), nullptr});
    const size_t total = size_t(held->view.view()->len);
    if (offset > total || nbytes > total - offset)
        throw UsageError("wrap: [" + std::to_string(offset) + ", +" + std::to_string(nbytes) +
                         ") is outside the buffer of " + std::to_string(total) + " bytes");
    const size_t page = device.info().page_bytes;
    const FileDamage* file = damage_of(owner);
    {
        const Unlocked unlocked;  // a device with its own memory reads all of it
        held->buffer = device.wrap(static_cast<char*>(held->view.ptr) + offset, (nbytes + page - 1) / page * page);
        if (file) check_file(*file);
    }
    held->buffer->bytes = nbytes;  // the rest of its last page is not the owner's
    held->buffer->read_only = held->view.readonly;
    held->buffer->file = file;
    Buffer* buffer = held->buffer.get();
    return std::shared_ptr<Buffer>(buffer, [held = held.release()](Buffer*) {
        const Locked locked;
        delete held;
    });
}

// A recording may have to wait for the device. Other Python threads run during the wait.
void delete_unlocked(Plan* plan) {
    if (!PyGILState_Check()) {
        delete plan;
        return;
    }
    const Unlocked unlocked;
    delete plan;
}

void check_copy(const Buffer& b, size_t offset, size_t nbytes) {
    if (!b.copies()) throw UsageError("this device copies nothing into this buffer or out of it");
    if (offset > b.bytes || nbytes > b.bytes - offset)
        throw UsageError("[" + std::to_string(offset) + ", +" + std::to_string(nbytes) + ") is outside the buffer of " +
                         std::to_string(b.bytes) + " bytes");
}

py::array_t<uint8_t> read_buffer(const Buffer& b, size_t offset, std::optional<size_t> nbytes) {
    const size_t n = nbytes ? *nbytes : b.bytes - std::min(offset, b.bytes);
    check_copy(b, offset, n);
    py::array_t<uint8_t> out{py::ssize_t(n)};
    b.read(offset, out.mutable_data(), n);
    return out;
}

void write_buffer(Buffer& b, const py::buffer& data, size_t offset) {
    const py::buffer_info from = contiguous(data, "write");
    const size_t n = size_t(from.view()->len);
    if (b.read_only) throw UsageError("write: the buffer is read-only");
    check_copy(b, offset, n);
    b.write(offset, from.ptr, n);
}

py::dict info_dict(const Device& device) {
    const DeviceInfo info = device.info();
    py::dict features;
    for (const auto& [key, value] : info.features) features[py::str(key)] = value;
    py::dict d;
    d["name"] = info.name;
    d["backend"] = info.backend;
    d["unified_memory"] = info.unified_memory;
    d["working_set_bytes"] = info.working_set_bytes;
    d["allocated_bytes"] = info.allocated_bytes;
    d["max_buffer_bytes"] = info.max_buffer_bytes;
    d["max_threadgroup_bytes"] = info.max_threadgroup_bytes;
    d["page_bytes"] = info.page_bytes;
    d["asynchronous"] = info.asynchronous;
    d["features"] = features;
    return d;
}

void bind_errors() {
    // The Python classes are in zincmetal.errors. C++ exceptions of every module are raised as these classes.
    // Never released: that would be after the end of the interpreter.
    static const py::handle errors = py::module_::import("zincmetal.errors").release();
    py::register_local_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const OutOfMemoryError& e) {
            py::set_error(errors.attr("OutOfMemoryError"), e.what());
        } catch (const std::bad_alloc&) {
            py::set_error(errors.attr("OutOfMemoryError"), "the process has no memory left; close models or programs");
        } catch (const std::system_error& e) {
            py::set_error(errors.attr("DeviceError"), e.what());
        } catch (const DeviceError& e) {
            py::set_error(errors.attr("DeviceError"), e.what());
        } catch (const ContextFullError& e) {
            py::set_error(errors.attr("ContextFullError"), e.what());
        } catch (const UsageError& e) {
            py::set_error(errors.attr("UsageError"), e.what());
        }
    });
}

// NumPy dtypes with the fields of kernels/params.h: Python fills parameters by field name.
void bind_params(py::module_& m) {
    py::dict params;
    // Several cores may be loaded at once, and pybind11 keeps one register for all of them.
#define PARAMS(Struct, ...)                                                                                            \
    if (!py::detail::get_numpy_internals().get_type_info<Struct>(false)) {                                             \
        PYBIND11_NUMPY_DTYPE(Struct, __VA_ARGS__);                                                                     \
    }                                                                                                                  \
    params[#Struct] = py::dtype::of<Struct>();

    PARAMS(Step, n_tokens, pos, n_chosen, reserved, chosen)
    PARAMS(EmbedParams, n_embd, row_bytes, n_vocab, first, n_rows, scale)
    PARAMS(NormParams, n, eps)
    PARAMS(MatMulParams, k, m, row_bytes, residual_stride, scale_stride)
    PARAMS(StackParams, k, pair, m, row_bytes, is_f32)
    PARAMS(MoeParams, k, m, row_bytes, expert_bytes, n_expert, n_used)
    PARAMS(MoeSharedParams, k, m, row_bytes, expert_bytes, n_expert, n_used, k_shared, row_bytes_shared)
    PARAMS(TopKParams, n_expert, n_used, has_shared, scale)
    PARAMS(MoeMmParams, k, m, row_bytes, expert_bytes, n_expert, x_div)
    PARAMS(MoeSortParams, n_expert, n_used, max_tiles)
    PARAMS(MoeMixParams, n, n_used)
    PARAMS(RopeKvParams, n_head, n_head_kv, head_dim, q_stride, n_rot, eps, magnitude)
    PARAMS(AttentionParams, n_head, n_head_kv, head_dim, window, gate_stride, n_split, scale)
    PARAMS(SsmParams, n_k_head, n_v_head, d_k, d_v, d_conv, norm_eps, l2_eps)
    PARAMS(ElementwiseParams, n)
    PARAMS(ArgmaxParams, n, n_part)
    PARAMS(Candidates, n, n_not_finite, largest, sum_exp, sum_x_exp, logit, id)
    PARAMS(CandidatesParams, n, n_part)
#undef PARAMS

    m.def(
        "params_dtype",
        [params](const std::string& name) {
            if (!params.contains(name)) throw UsageError("params_dtype: no parameter struct is named " + name);
            return params[name.c_str()];
        },
        py::arg("name"));
}

void bind_buffer(py::module_& m) {
    py::class_<Buffer, std::shared_ptr<Buffer>>(m, "Buffer", py::module_local(), py::buffer_protocol())
        .def_readonly("nbytes", &Buffer::bytes)
        .def_property_readonly("shared", [](const Buffer& b) { return b.host != nullptr; })
        .def("read", &read_buffer, py::arg("offset") = 0, py::arg("nbytes") = py::none())
        .def("write", &write_buffer, py::arg("data"), py::arg("offset") = 0)
        .def_buffer([](Buffer& b) -> py::buffer_info {
            if (!b.host) throw UsageError("the host does not see this buffer's memory; use read() and write()");
            return {static_cast<uint8_t*>(b.host), py::ssize_t(b.bytes), b.read_only};
        });
}

using DeviceClass = py::class_<Device, std::shared_ptr<Device>>;

DeviceClass bind_device(py::module_& m) {
    DeviceClass device(m, "Device", py::module_local());
    device
        .def(py::init([](int threads, bool native, std::string kernel_folder) {
                 const Unlocked unlocked;
                 return std::shared_ptr<Device>(open_device({threads, native, std::move(kernel_folder)}));
             }),
             py::kw_only(), py::arg("threads") = 0, py::arg("native") = true, py::arg("kernel_folder") = "")
        .def_property_readonly("info", &info_dict)
        .def(
            "alloc",
            [](Device& d, size_t nbytes) {
                d.process.check();
                return d.alloc(nbytes);
            },
            py::arg("nbytes"))
        .def("wrap", &wrap, py::arg("owner"), py::arg("offset"), py::arg("nbytes"))
        .def("kernel_names",
             [](const Device& d) {
                 d.process.check();
                 const Unlocked unlocked;  // sources may have to be compiled
                 return d.kernel_names();
             })
        .def(
            "limits",
            [](Device& d, const std::string& kernel) {
                d.process.check();
                const PipelineLimits l = d.pipeline(kernel)->limits;
                return py::make_tuple(l.max_threads, l.simd_width, l.threadgroup_bytes);
            },
            py::arg("kernel"))
        .def(
            "prepare",
            [](Device& d, const std::vector<std::string>& kernels) {
                d.process.check();
                const Unlocked unlocked;
                d.prepare(kernels);
            },
            py::arg("kernels"));
    return device;
}

void bind_running(DeviceClass device) {
    device
        .def(
            "run",
            [](Device& d, const std::vector<PyDispatch>& dispatches) {
                auto list = to_dispatches(d, dispatches);
                const Unlocked unlocked;
                const auto recording = d.record(std::move(list));
                const RunTimes times = d.wait(d.submit(*recording));
                return times.gpu_end - times.gpu_start;
            },
            py::arg("dispatches"))
        .def(
            "time_each",
            [](Device& d, const std::vector<PyDispatch>& dispatches) {
                const auto list = to_dispatches(d, dispatches);
                const Unlocked unlocked;
                return d.time_each(list);
            },
            py::arg("dispatches"))
        .def(
            "start_capture",
            [](Device& d, const std::string& path) {
                check_captures(d);
                d.start_capture(path);
            },
            py::arg("path"))
        .def("stop_capture", [](Device& d) {
            check_captures(d);
            d.stop_capture();
        });
}

// Runs a call that polls without the interpreter's lock.
template <class Call>
auto interruptible(Call&& call) {
    static const unsigned long main = main_thread();
    // Allocates this thread's memory for exceptions, while there is some.
    static_cast<void>(std::uncaught_exceptions());
    Interruptible scope(main);
    return call(scope.listens() ? Poll(std::ref(scope)) : Poll());
}

void bind_plan(py::module_& m) {
    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", py::module_local())
        .def(py::init([](std::shared_ptr<Device> device, const std::vector<PyDispatch>& dispatches, uint32_t max_tokens,
                         bool has_argmax) {
                 auto list = to_dispatches(*device, dispatches);
                 const Unlocked unlocked;
                 return std::shared_ptr<Plan>(new Plan(std::move(device), std::move(list), max_tokens, has_argmax),
                                              delete_unlocked);
             }),
             py::arg("device").none(false), py::arg("dispatches"), py::arg("max_tokens"), py::arg("has_argmax") = false)
        .def_readonly("max_tokens", &Plan::max_tokens)
        .def_readonly("n_dispatches", &Plan::n_dispatches)
        .def_readonly("n_barriers", &Plan::n_barriers);

    py::class_<Steps, std::shared_ptr<Steps>>(m, "Steps", py::module_local())
        .def(py::init<std::shared_ptr<Buffer>, std::shared_ptr<Buffer>, uint32_t, uint32_t>(),
             py::arg("step").none(false), py::arg("tokens").none(false), py::arg("n_ctx"), py::arg("n_vocab"))
        .def_property_readonly("length", &Steps::length)
        .def_property_readonly("n_ctx", &Steps::n_ctx)
        .def_property_readonly("counters",
                               [](const Steps& s) {
                                   const Counters c = s.counters();
                                   py::dict d;
                                   d["steps"] = c.steps;
                                   d["tokens"] = c.tokens;
                                   d["command_buffers"] = c.command_buffers;
                                   d["dispatches"] = c.dispatches;
                                   d["barriers"] = c.barriers;
                                   d["max_in_flight"] = c.max_in_flight;
                                   d["gpu_seconds"] = c.gpu_seconds;
                                   return d;
                               })
        .def("settle",
             [](Steps& s) {
                 const Unlocked unlocked;
                 return s.settle();
             })
        .def("rewind", &Steps::rewind, py::arg("length"))
        .def("resume", &Steps::resume, py::arg("length"))
        .def("close", &Steps::close);

    m.def(
        "decode_step",
        [](Steps& steps, const std::shared_ptr<Plan>& plan, int64_t token, bool ahead) {
            return interruptible([&](const Poll& poll) { return steps.decode(plan, token, ahead, poll); });
        },
        py::arg("steps"), py::arg("plan").none(false), py::arg("token"), py::arg("ahead") = false);
    m.def(
        "prefill_step",
        [](Steps& steps, const std::shared_ptr<Plan>& plan, const py::array_t<int32_t, py::array::c_style>& ids) {
            if (ids.ndim() != 1) throw UsageError("prefill_step: ids must have one dimension");
            const int32_t* data = ids.data();
            const size_t n = size_t(ids.size());
            return interruptible([&](const Poll& poll) { return steps.prefill(plan, data, n, poll); });
        },
        py::arg("steps"), py::arg("plan").none(false), py::arg("ids").noconvert());
}

py::tuple names_in(const char* const* names) {
    py::list list;
    while (*names) list.append(*names++);
    return py::tuple(list);
}

void bind_all(py::module_& m) {
    bind_errors();
    bind_params(m);
    bind_buffer(m);
    bind_running(bind_device(m));
    bind_plan(m);
    m.def("shapes", [] {
        py::dict d;
        for (const Shape* shape = shapes; shape->name; shape++) d[shape->name] = shape->value;
        return d;
    });
    m.def("size_classes", [] {
        py::dict d;
        for (const SizeClasses* c = size_classes; c->name; c++)
            d[c->name] = py::tuple(py::cast(std::vector(c->sizes, std::find(c->sizes, std::end(c->sizes), 0u))));
        return d;
    });
    m.def("tensor_types", [] { return names_in(tensor_types); });
    m.def("expert_types", [] { return names_in(expert_types); });
}

}  // namespace

// Stands before pybind11's own check. That takes the interpreter's lock by a call that only the main interpreter may
// make, and would wait for itself for ever.
static bool in_main_interpreter() {
    if (PyInterpreterState_Get() == PyInterpreterState_Main()) return true;
    PyErr_SetString(PyExc_ImportError,
                    "zincmetal's core does not run in a sub-interpreter; import it in the main one (for mod_wsgi: "
                    "WSGIApplicationGroup %{GLOBAL})");
    return false;
}
#undef PYBIND11_PLUGIN_IMPL
#define PYBIND11_PLUGIN_IMPL(name)                                                                                     \
    static PyObject* init_##name();                                                                                    \
    extern "C" PYBIND11_EXPORT PyObject* PyInit_##name();                                                              \
    extern "C" PYBIND11_EXPORT PyObject* PyInit_##name() { return in_main_interpreter() ? init_##name() : nullptr; }   \
    static PyObject* init_##name()

// Python finds a module's entry point by the name of its file. The code of all entry points is one.
#define MODULE(name)                                                                                                   \
    PYBIND11_MODULE(name, m, py::multiple_interpreters::not_supported()) { bind_all(m); }
MODULE(_core_cpu)
MODULE(_core_checked)
MODULE(_core_cuda)
MODULE(_core_metal)
