#include "simt/report.h"

namespace gptkernels::simt {

const char* name_of(Violation kind) {
    constexpr const char* NAMES[VIOLATIONS] = {"out of bounds (global)",
                                               "out of bounds (shared)",
                                               "misaligned",
                                               "uninitialised shared memory",
                                               "shared race",
                                               "cp.async not waited for",
                                               "divergent barrier",
                                               "divergent warp function"};
    return NAMES[(int)kind];
}

const char* name_of(Class c) {
    constexpr const char* NAMES[CLASSES] = {"load_global", "store_global", "load_shared",  "store_shared",
                                            "cp_async",    "ldmatrix",     "mma",          "shuffle",
                                            "barrier",     "atomic",       "approximation"};
    return NAMES[(int)c];
}

Report& report() {
    static Report the_report;
    return the_report;
}

}  // namespace gptkernels::simt
