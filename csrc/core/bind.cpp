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
#include <span>
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
std::shared_ptr<Buffer> wrap(const std::shared_ptr<Device>& device, const py::buffer& owner, size_t offset,
                             size_t nbytes) {
    device->process.check();
    struct Held {
        py::buffer_info view;
        std::shared_ptr<Buffer> buffer;
    };
    auto held = std::make_unique<Held>(Held{contiguous(owner, "wrap"), nullptr});
    const size_t total = size_t(held->view.view()->len);
    if (offset > total || nbytes > total - offset)
        throw UsageError("wrap: [" + std::to_string(offset) + ", +" + std::to_string(nbytes) +
                         ") is outside the buffer of " + std::to_string(total) + " bytes");
    const size_t page = device->info().page_bytes;
    const FileDamage* file = damage_of(owner);
    {
        const Unlocked unlocked;  // a device with its own memory reads all of it
        held->buffer = device->wrap(static_cast<char*>(held->view.ptr) + offset, (nbytes + page - 1) / page * page);
        if (file) check_file(*file);
    }
    held->buffer->bytes = nbytes;  // the rest of its last page is not the owner's
    held->buffer->read_only = held->view.readonly;
    held->buffer->file = file;
    held->buffer->device = device;
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

void check_range(const Buffer& b, size_t offset, size_t nbytes) {
    if (!b.copies()) throw UsageError("this device copies nothing into this buffer or out of it");
    if (offset > b.bytes || nbytes > b.bytes - offset)
        throw UsageError("[" + std::to_string(offset) + ", +" + std::to_string(nbytes) + ") is outside the buffer of " +
                         std::to_string(b.bytes) + " bytes");
}

py::array_t<uint8_t> read_buffer(const Buffer& b, size_t offset, std::optional<size_t> nbytes) {
    const size_t n = nbytes ? *nbytes : b.bytes - std::min(offset, b.bytes);
    check_range(b, offset, n);
    py::array_t<uint8_t> out{py::ssize_t(n)};
    b.read(offset, out.mutable_data(), n);
    return out;
}

void write_buffer(Buffer& b, const py::buffer& data, size_t offset) {
    const py::buffer_info from = contiguous(data, "write");
    const size_t n = size_t(from.view()->len);
    if (b.read_only) throw UsageError("write: the buffer is read-only");
    check_range(b, offset, n);
    b.write(offset, from.ptr, n);
}

using PyCopy = std::tuple<std::shared_ptr<Buffer>, uint64_t, std::shared_ptr<Buffer>, uint64_t, uint64_t>;

void check_copy(const Device& device, const PyCopy& copy) {
    const auto& [to, offset, from, from_offset, nbytes] = copy;
    if (!to || !from) throw UsageError("copy: a buffer is missing");
    for (const auto& buffer : {to, from})
        if (buffer->device.lock().get() != &device) throw UsageError("copy: a buffer is another device's");
    if (to->read_only) throw UsageError("copy: the buffer is read-only");
    check_range(*to, offset, nbytes);
    check_range(*from, from_offset, nbytes);
    if (offset % COPY_MULTIPLE || from_offset % COPY_MULTIPLE || nbytes % COPY_MULTIPLE)
        throw UsageError("copy: offsets and sizes must be multiples of " + std::to_string(COPY_MULTIPLE) + " bytes");
    if (to == from && offset < from_offset + nbytes && from_offset < offset + nbytes)
        throw UsageError("copy: the ranges overlap");
}

// Bytes between buffers of a device: (to, offset, from, from_offset, nbytes).
void copy_buffers(Device& device, const std::vector<PyCopy>& from) {
    device.process.check();
    std::vector<Copy> copies;
    for (const PyCopy& copy : from) {
        check_copy(device, copy);
        const auto& [to, offset, source, from_offset, nbytes] = copy;
        if (nbytes > 0) copies.push_back({to, offset, source, from_offset, nbytes});
    }
    const Unlocked unlocked;
    if (!copies.empty()) device.copy(copies);
}

void copy_from(const std::shared_ptr<Buffer>& to, const std::shared_ptr<Buffer>& source, uint64_t from_offset,
               uint64_t offset, std::optional<uint64_t> nbytes) {
    const std::shared_ptr<Device> device = to->device.lock();
    if (!device) throw UsageError("the device is closed; keep it while its buffers are in use");
    const uint64_t rest = source->bytes - std::min<uint64_t>(from_offset, source->bytes);
    copy_buffers(*device, {{to, offset, source, from_offset, nbytes.value_or(rest)}});
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

    PARAMS(Step, n_tokens, n_single, n_out, n_page_writes, number, reserved)
    PARAMS(Row, pos, begin, end, pages, slot, slot_out, token, drafted)
    PARAMS(PageWrite, at, page)
    PARAMS(BeginParams, max_rows, max_page_writes)
    PARAMS(Choice, id, n_not_finite, logprob, flags, accepted)
    PARAMS(AcceptParams, outs)
    PARAMS(Draw, temperature, top_k, top_p, min_p, typical_p, repeat_penalty, presence_penalty, frequency_penalty,
           repeat_last_n, key_low, key_high, bias_at, n_bias, mask_at, has_mask, n_logprobs, pos, pages, reserved)
    PARAMS(Bias, id, value)
    PARAMS(EmbedParams, n_embd, row_bytes, n_vocab, first, n_rows, scale)
    PARAMS(NormParams, n, groups, weighted, scaled, eps, next_eps, scale)
    PARAMS(MatMulParams, k, m, row_bytes, residual_stride, scale_stride, has_bias, normed, eps)
    PARAMS(MulFewParams, k, m, row_bytes, residual_stride, scale_stride, kind, k_split, rows)
    PARAMS(StackParams, k, pair, m, row_bytes, is_f32, has_bias, normed, eps)
    PARAMS(MoeParams, k, m, row_bytes, expert_bytes, n_expert, n_used, kind, has_bias, alone, normed, eps)
    PARAMS(MoeSharedParams, k, m, row_bytes, expert_bytes, n_expert, n_used, has_bias, k_shared, row_bytes_shared)
    PARAMS(TopKParams, n_expert, n_used, shared, score, normalised, has_bias, has_scales, n_group, n_group_used, scale)
    PARAMS(MoeMvParams, experts, choice)
    PARAMS(MoeMmParams, k, m, row_bytes, expert_bytes, n_expert, x_div, kind, has_bias)
    PARAMS(MoeSortParams, n_expert, n_used, max_tiles)
    PARAMS(MoeMixParams, n, n_used, alone)
    PARAMS(RopeKvParams, n_head, n_head_kv, head_dim, q_stride, n_rot, v_norm, eps, magnitude, temperature,
           temperature_length)
    PARAMS(AttentionParams, n_head, n_head_kv, head_dim, window, gate_stride, n_split, singles, both_ways, has_sinks,
           scale)
    PARAMS(LatentParams, n_head, latent, n_rot, n_split, scale)
    PARAMS(RopeLatentParams, n_head, n_still, latent, n_rot, eps, magnitude, temperature, temperature_length)
    PARAMS(HeadsParams, k, m, row_bytes, head_bytes, n_head)
    PARAMS(SsmParams, n_k_head, n_v_head, repeat, gate_step, d_k, d_v, d_conv, norm_eps, l2_eps)
    PARAMS(Mamba2Params, n_head, n_group, d_head, d_state, d_conv, norm_eps)
    PARAMS(ShortConvParams, n, taps)
    PARAMS(ElementwiseParams, n)
    PARAMS(SliceParams, n, stride)
    PARAMS(LogitParams, n, scale, cap)
    PARAMS(ArgmaxParams, n, n_part)
    PARAMS(Logprobs, n, reserved, id, logprob)
    PARAMS(DrawParams, n, n_part, tried)
    PARAMS(DrawKept, n, floor_key, floor_id, key, id)
    PARAMS(DrawPart, n_not_finite, before_largest, before_sum, n, largest, sum_exp, sum_x_exp, best_key, best_id, kept,
           before)
    PARAMS(DrawState, mode, try_key, try_id, most, wanted, largest, least, log_sum, entropy, log_sum_exp)
    PARAMS(DrawTry, n, sum, best_score, best_key, best_id)
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
        .def("copy_from", &copy_from, py::arg("source").none(false), py::arg("from_offset") = 0, py::arg("offset") = 0,
             py::arg("nbytes") = py::none())
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
            [](const std::shared_ptr<Device>& d, size_t nbytes, bool shared) {
                d->process.check();
                std::shared_ptr<Buffer> buffer = d->alloc(nbytes, shared);
                buffer->device = d;
                return buffer;
            },
            py::arg("nbytes"), py::arg("shared") = false)
        .def("copy", &copy_buffers, py::arg("copies"))
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

// The items of an array [n] with the layout of T. They stay where they are.
template <class T>
std::span<const T> items(const py::array& array, const char* name) {
    const bool has_layout =
        py::detail::npy_api::get().PyArray_EquivTypes_(array.dtype().ptr(), py::dtype::of<T>().ptr());
    const auto address = reinterpret_cast<uintptr_t>(array.data());
    if (array.ndim() != 1 || !has_layout || !(array.flags() & py::array::c_style) || address % alignof(T) != 0)
        throw UsageError(std::string(name) + " must be a contiguous array [n] of " +
                         std::string(py::str(py::object(py::dtype::of<T>()))));
    return {static_cast<const T*>(array.data()), size_t(array.size())};
}

Description described(const py::array& rows, const py::array& outs, const py::array& page_writes,
                      const std::optional<py::array>& draws, uint32_t n_single) {
    Description step{items<Row>(rows, "rows"),
                     items<uint32_t>(outs, "outs"),
                     items<PageWrite>(page_writes, "page_writes"),
                     {},
                     n_single};
    if (!draws) return step;
    step.draws = items<Draw>(*draws, "draws");
    if (step.draws.size() != step.outs.size()) throw UsageError("a step needs one draw for each output, or None");
    return step;
}

py::array to_array(const std::vector<Choice>& choices) {
    return py::array_t<Choice>(py::ssize_t(choices.size()), choices.data());
}

py::dict counters_dict(const Steps& steps) {
    const Counters c = steps.counters();
    py::dict d;
    d["steps"] = c.steps;
    d["tokens"] = c.tokens;
    d["command_buffers"] = c.command_buffers;
    d["dispatches"] = c.dispatches;
    d["barriers"] = c.barriers;
    d["max_in_flight"] = c.max_in_flight;
    d["gpu_seconds"] = c.gpu_seconds;
    return d;
}

void bind_plan(py::module_& m) {
    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", py::module_local())
        .def(py::init([](std::shared_ptr<Device> device, const std::vector<PyDispatch>& dispatches, uint32_t max_tokens,
                         uint32_t n_out) {
                 auto list = to_dispatches(*device, dispatches);
                 const Unlocked unlocked;
                 return std::shared_ptr<Plan>(new Plan(std::move(device), std::move(list), max_tokens, n_out),
                                              delete_unlocked);
             }),
             py::arg("device").none(false), py::arg("dispatches"), py::arg("max_tokens"), py::arg("n_out") = 0)
        .def_readonly("max_tokens", &Plan::max_tokens)
        .def_readonly("n_out", &Plan::n_out)
        .def_readonly("n_dispatches", &Plan::n_dispatches)
        .def_readonly("n_barriers", &Plan::n_barriers);
}

void bind_steps(py::module_& m) {
    using Shared = std::shared_ptr<Buffer>;
    py::class_<Steps, std::shared_ptr<Steps>>(m, "Steps", py::module_local())
        .def(py::init([](std::shared_ptr<Device> device, const Shared& step, const Shared& next_step,
                         const Shared& next_rows, const Shared& next_outs, const Shared& next_pages,
                         const Shared& next_draws, const Shared& results, uint32_t n_vocab, uint32_t n_page_entries) {
                 return std::make_shared<Steps>(
                     std::move(device),
                     StepBuffers{step, next_step, next_rows, next_outs, next_pages, next_draws, results}, n_vocab,
                     n_page_entries);
             }),
             py::arg("device").none(false), py::arg("step").none(false), py::arg("next_step").none(false),
             py::arg("next_rows").none(false), py::arg("next_outs").none(false), py::arg("next_pages").none(false),
             py::arg("next_draws").none(false), py::arg("results").none(false), py::arg("n_vocab"),
             py::arg("n_page_entries"))
        .def_property_readonly("in_flight", &Steps::in_flight)
        .def_property_readonly("counters", &counters_dict)
        .def("drop",
             [](Steps& s) {
                 const Unlocked unlocked;
                 s.drop();
             })
        .def("close", &Steps::close);
}

void bind_step_functions(py::module_& m) {
    m.def(
        "decode_step",
        [](Steps& steps, const std::shared_ptr<Plan>& plan, const py::array& rows, const py::array& outs,
           const py::array& page_writes, const std::optional<py::array>& draws, uint32_t n_single) {
            const Description step = described(rows, outs, page_writes, draws, n_single);
            return interruptible([&](const Poll& poll) { return steps.decode(plan, step, poll); });
        },
        py::arg("steps"), py::arg("plan").none(false), py::arg("rows"), py::arg("outs"), py::arg("page_writes"),
        py::arg("draws") = py::none(), py::arg("n_single") = 0);
    m.def(
        "collect_step",
        [](Steps& steps) { return to_array(interruptible([&](const Poll& poll) { return steps.collect(poll); })); },
        py::arg("steps"));
    m.def(
        "describe",
        [](Steps& steps, const py::array& rows, const py::array& outs, const py::array& page_writes,
           const std::optional<py::array>& draws, uint32_t n_single) {
            const Description step = described(rows, outs, page_writes, draws, n_single);
            const Unlocked unlocked;
            steps.describe(step);
        },
        py::arg("steps"), py::arg("rows"), py::arg("outs"), py::arg("page_writes"), py::arg("draws") = py::none(),
        py::arg("n_single") = 0);
    m.def(
        "submit_described",
        [](Steps& steps, const std::shared_ptr<Plan>& plan) {
            return interruptible([&](const Poll& poll) { return steps.submit_described(plan, poll); });
        },
        py::arg("steps"), py::arg("plan").none(false));
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
    bind_steps(m);
    bind_step_functions(m);
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
