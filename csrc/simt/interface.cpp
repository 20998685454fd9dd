#include "simt/interface.h"

gptkernels::simt::Interface gptkernels_simt_interface() {
    using namespace gptkernels::simt;
    return {&report(), &emulated_device(), set_schedule};
}
