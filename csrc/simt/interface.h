// What the Python module reaches in the library of operators, which it is not linked with.
#pragma once

#include "common/device.cuh"
#include "simt/report.h"

namespace gptkernels::simt {

struct Interface {
    Report* report;
    Device* device;
    void (*set_schedule)(uint64_t seed);
};

}  // namespace gptkernels::simt

extern "C" __attribute__((visibility("default"))) gptkernels::simt::Interface gptkernels_simt_interface();
