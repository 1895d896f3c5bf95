// zincmetal._host: files mapped into memory, for every device. A page that the file no longer backs reads as zeros and
// marks its map as damaged. Without the guard the operating system would end the process. Plain C API: it runs in any
// interpreter.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>

#include "host/bus_guard.h"
#include "core/gil.h"

namespace zinc {
namespace {

struct Identity {
    off_t size;
    int64_t seconds, nanoseconds;  // of the last change of its content
};

bool identify(int fd, Identity& out) {
    struct stat s;
    if (fstat(fd, &s) != 0) return false;
#ifdef __APPLE__
    const timespec& changed = s.st_mtimespec;
#else
    const timespec& changed = s.st_mtim;
#endif
    out = {s.st_size, int64_t(changed.tv_sec), int64_t(changed.tv_nsec)};
    return true;
}

struct Map {
    PyObject_HEAD int fd;
    Identity opened;
    GuardedMap* guarded;  // null once closed
    PyObject* path;       // bytes; the guard points into them
    size_t n_views;
};

const char* start_of(const Map* self) { return static_cast<const char*>(self->guarded->memory()); }

bool check_open(const Map* self) {
    if (self->guarded) return true;
    PyErr_SetString(PyExc_ValueError, "the map is closed");
    return false;
}

PyObject* map_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    int fd = -1;
    PyObject* path = nullptr;
    static const char* names[] = {"fd", "path", nullptr};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO&", const_cast<char**>(names), &fd, PyUnicode_FSConverter, &path))
        return nullptr;
    auto* self = reinterpret_cast<Map*>(type->tp_alloc(type, 0));
    if (!self) {
        Py_DECREF(path);
        return nullptr;
    }
    self->path = path;
    self->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (self->fd >= 0 && identify(self->fd, self->opened))
        self->guarded = GuardedMap::open(self->fd, size_t(self->opened.size), PyBytes_AS_STRING(path));
    if (self->guarded) return reinterpret_cast<PyObject*>(self);
    PyErr_SetFromErrno(PyExc_OSError);
    Py_DECREF(self);
    return nullptr;
}

void unmap(Map* self) {
    if (self->guarded) self->guarded->close();
    self->guarded = nullptr;
    if (self->fd >= 0) close(self->fd);
    self->fd = -1;
}

void map_dealloc(PyObject* object) {
    auto* self = reinterpret_cast<Map*>(object);
    PyTypeObject* type = Py_TYPE(object);
    unmap(self);
    Py_XDECREF(self->path);
    type->tp_free(object);
    Py_DECREF(type);
}

PyObject* map_close(PyObject* object, PyObject*) {
    auto* self = reinterpret_cast<Map*>(object);
    if (self->n_views) {
        PyErr_SetString(PyExc_BufferError, "the map is in use: views look into it");
        return nullptr;
    }
    unmap(self);
    Py_RETURN_NONE;
}

PyObject* map_changed(PyObject* object, PyObject*) {
    const auto* self = reinterpret_cast<Map*>(object);
    if (!check_open(self)) return nullptr;
    arm_bus_guard();  // another handler may have been installed over it
    Identity now{};
    if (!identify(self->fd, now)) return PyErr_SetFromErrno(PyExc_OSError);
    const Identity& then = self->opened;
    return PyBool_FromLong(now.size != then.size || now.seconds != then.seconds || now.nanoseconds != then.nanoseconds);
}

// Asks for the pages ahead of reading them, one byte of each.
void touch(const Map* self, size_t start, size_t n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), first = start / page * page;
#ifdef __APPLE__
    radvisory advice{off_t(first), int(n + (start - first))};
    fcntl(self->fd, F_RDADVISE, &advice);
#endif
    madvise(const_cast<char*>(start_of(self)) + first, n + (start - first), MADV_WILLNEED);
    for (size_t at = first; at < start + n; at += page)
        static_cast<void>(*static_cast<const volatile char*>(start_of(self) + at));
}

PyObject* map_touch(PyObject* object, PyObject* args) {
    auto* self = reinterpret_cast<Map*>(object);
    Py_ssize_t start = 0, n = 0;
    if (!PyArg_ParseTuple(args, "nn", &start, &n) || !check_open(self)) return nullptr;
    const auto size = Py_ssize_t(self->guarded->bytes());
    if (start < 0 || n < 0 || start > size || n > size - start || n > (1 << 30)) {
        PyErr_SetString(PyExc_ValueError, "the range is outside the map, or longer than 1 GiB");
        return nullptr;
    }
    self->n_views++;  // the guard stays while this runs
    {
        const Unlocked unlocked;
        touch(self, size_t(start), size_t(n));
    }
    self->n_views--;
    Py_RETURN_NONE;
}

PyObject* map_closed(PyObject* object, void*) { return PyBool_FromLong(!reinterpret_cast<Map*>(object)->guarded); }

PyObject* map_damaged(PyObject* object, void*) {
    const auto* self = reinterpret_cast<Map*>(object);
    return PyBool_FromLong(self->guarded && self->guarded->damage().damaged);
}

PyObject* map_damage(PyObject* object, void*) {
    const auto* self = reinterpret_cast<Map*>(object);
    if (!check_open(self)) return nullptr;
    return PyCapsule_New(const_cast<FileDamage*>(&self->guarded->damage()), FILE_DAMAGE, nullptr);
}

Py_ssize_t map_length(PyObject* object) {
    const auto* self = reinterpret_cast<Map*>(object);
    return check_open(self) ? Py_ssize_t(self->guarded->bytes()) : -1;
}

// A copy of a slice, as of bytes.
PyObject* map_subscript(PyObject* object, PyObject* key) {
    const auto* self = reinterpret_cast<Map*>(object);
    if (!check_open(self)) return nullptr;
    Py_ssize_t start = 0, stop = 0, step = 1;
    if (!PySlice_Check(key)) {
        PyErr_SetString(PyExc_TypeError, "a map is indexed by slices; for more, take a memoryview of it");
        return nullptr;
    }
    if (PySlice_Unpack(key, &start, &stop, &step) != 0) return nullptr;
    const Py_ssize_t n = PySlice_AdjustIndices(Py_ssize_t(self->guarded->bytes()), &start, &stop, step);
    if (step == 1) return PyBytes_FromStringAndSize(start_of(self) + start, n);
    PyErr_SetString(PyExc_ValueError, "a slice of a map has no step");
    return nullptr;
}

int map_getbuffer(PyObject* object, Py_buffer* view, int flags) {
    auto* self = reinterpret_cast<Map*>(object);
    view->obj = nullptr;
    if (!check_open(self)) return -1;
    const auto n = Py_ssize_t(self->guarded->bytes());
    if (PyBuffer_FillInfo(view, object, self->guarded->memory(), n, 1, flags) != 0) return -1;
    self->n_views++;
    return 0;
}

void map_releasebuffer(PyObject* object, Py_buffer*) { reinterpret_cast<Map*>(object)->n_views--; }

// A docstring begins with the signature, for inspect and stubtest.
PyMethodDef map_methods[] = {
    {"close", map_close, METH_NOARGS,
     "close($self, /)\n--\n\nGive the memory back. Raises BufferError while views look into it."},
    {"changed", map_changed, METH_NOARGS,
     "changed($self, /)\n--\n\nWhether the file's size or time of change differs from when it was mapped."},
    {"touch", map_touch, METH_VARARGS,
     "touch($self, start, nbytes, /)\n--\n\nRead these pages into memory, at most 1 GiB of them."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef map_properties[] = {{"closed", map_closed, nullptr, "Whether close() was called.", nullptr},
                                {"damaged", map_damaged, nullptr,
                                 "Whether pages were read that the file no longer backs: they are zeros.", nullptr},
                                {"_damage", map_damage, nullptr, "The same for the compiled cores.", nullptr},
                                {nullptr, nullptr, nullptr, nullptr, nullptr}};

template <class T>
void* slot(T function) {
    return reinterpret_cast<void*>(function);
}

int exec(PyObject* module) {
    PyType_Slot slots[] = {{Py_tp_new, slot(map_new)},
                           {Py_tp_dealloc, slot(map_dealloc)},
                           {Py_tp_methods, map_methods},
                           {Py_tp_getset, map_properties},
                           {Py_mp_length, slot(map_length)},
                           {Py_mp_subscript, slot(map_subscript)},
                           {Py_bf_getbuffer, slot(map_getbuffer)},
                           {Py_bf_releasebuffer, slot(map_releasebuffer)},
                           {Py_tp_doc, const_cast<char*>("Map(fd, path)\n--\n\nA whole open file, read-only.")},
                           {0, nullptr}};
    PyType_Spec spec = {"zincmetal._host.Map", sizeof(Map), 0, Py_TPFLAGS_DEFAULT, slots};
    PyObject* type = PyType_FromSpec(&spec);
    if (!type) return -1;
    if (PyModule_AddObject(module, "Map", type) == 0) return 0;
    Py_DECREF(type);
    return -1;
}

PyModuleDef_Slot module_slots[] = {{Py_mod_exec, slot(exec)}, {0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_host", "Files in memory.", 0, nullptr, module_slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace zinc

PyMODINIT_FUNC PyInit__host() { return PyModuleDef_Init(&zinc::definition); }
