// gptkernels._simt_report: the reports of csrc/simt in Python. Dictionaries and numbers only; no torch, no numpy.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/interface.h"

namespace py = pybind11;
using namespace gptkernels::simt;

namespace {

Interface interface;

// The library of operators, which is loaded already: its state is the one to report.
void attach(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
    void* symbol = handle ? dlsym(handle, "gptkernels_simt_interface") : nullptr;
    if (!symbol) throw std::runtime_error("no gptkernels simt library is loaded as " + library);
    interface = reinterpret_cast<decltype(&gptkernels_simt_interface)>(symbol)();
}

py::dict counter(const Counter& c) {
    py::dict d;
    d["instructions"] = c.instructions;
    if (c.bytes) d["bytes"] = c.bytes;
    if (c.sectors) d["sectors"] = c.sectors, d["ideal_sectors"] = c.ideal_sectors;
    if (c.wavefronts) d["wavefronts"] = c.wavefronts, d["ideal_wavefronts"] = c.ideal_wavefronts;
    return d;
}

py::dict kernels() {
    py::dict all;
    for (auto& [name, kernel] : interface.report->kernels) {
        py::dict d;
        d["launches"] = kernel.launches;
        d["blocks"] = kernel.blocks;
        d["warps"] = kernel.warps;
        d["shared_bytes"] = kernel.shared_bytes;
        for (int c = 0; c < CLASSES; ++c)
            if (kernel.counters[c].instructions) d[name_of((Class)c)] = counter(kernel.counters[c]);
        all[name.c_str()] = d;
    }
    return all;
}

py::dict violations() {
    py::dict d;
    for (int kind = 0; kind < VIOLATIONS; ++kind) d[name_of((Violation)kind)] = interface.report->violations[kind];
    return d;
}

}  // namespace

PYBIND11_MODULE(_simt_report, m) {
    m.doc() = "What csrc/simt saw while it ran kernels.";
    m.def("attach", &attach, py::arg("library"));
    m.def("reset", [] { *interface.report = {}; });
    m.def("kernels", &kernels, "Counters of every kernel by name, in warp-instructions by class.");
    m.def("violations", &violations, "How often each rule of the execution model was broken.");
    m.def("messages", [] { return interface.report->messages; }, "The first violations.");
    m.def("set_schedule", [](uint64_t seed) { interface.set_schedule(seed); }, py::arg("seed"));
    m.def(
        "set_device",
        [](int capability, int processors, int shared_bytes) {
            gptkernels::Device before = *interface.device;
            *interface.device = {capability, processors, shared_bytes};
            return std::make_tuple(before.capability, before.processors, before.shared_bytes);
        },
        py::arg("capability"), py::arg("processors"), py::arg("shared_bytes"),
        "The device that is emulated from now on; returns what it was before.");
}
