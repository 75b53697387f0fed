// Asking for memory ahead of its use. In assembler, because gcc removes loops that only prefetch.
#pragma once

// Into the nearest cache.
inline void prefetch_near(const void* line) {
    __asm__ volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(line)));
}

// Into the second-level cache.
inline void prefetch_far(const void* line) {
    __asm__ volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(line)));
}
