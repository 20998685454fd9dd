// Memory that stays from call to call. Fresh memory costs a page fault and a zeroed page every 4 KiB, which at these
// operators' arithmetic is a large share of eager's time; a workspace pays it once.
#pragma once

#include <cstddef>

namespace gptkernels {

// What a thread's workspaces are for: one buffer each, so that users of different slots may nest.
enum class Slot { PACK_A, PACK_B, ROUNDED, PARTIAL, PIECES, COLUMNS, OPERATOR, OPERATOR_THREAD, COUNT };

// At least `bytes` bytes, 64-byte aligned, not initialised, valid until the next call for this slot on this thread.
void* workspace(Slot slot, size_t bytes);

template <class T>
T* workspace_of(Slot slot, size_t count) {
    return static_cast<T*>(workspace(slot, count * sizeof(T)));
}

// Ask for 2 MiB pages for memory that is about to be written for the first time: 512 page faults become one.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace gptkernels
