#pragma once

// What tests ask of the emulator, callable through ctypes. Every library that contains the emulator has its own.
#define SIMT_API extern "C" __attribute__((visibility("default")))

// Order of blocks, and of the threads of a block between barriers: "forward", "reverse", "random:SEED", or "mixed:SEED"
// (launches take turns in the three). Overrides the environment variable SIMT_SCHEDULE; without either, forward. A
// launch depends on no other, except that turns are counted from this call. Returns 0, or 1 for anything else.
SIMT_API int simt_schedule(const char* schedule);

// What cudaDevAttrMultiProcessorCount answers; 1 at first, so that grids are small and blocks have more than one piece
// of work.
SIMT_API void simt_multiprocessors(int count);

// Launches so far, and one line about a recent one, 0 being the latest:
// "kernel<int>(Params) grid=2,1,1 block=64,1,1 dynamic=0 static=128 programmatic=1". Null beyond the last 64.
SIMT_API unsigned long long simt_launches();
SIMT_API const char* simt_launch(unsigned back);

// What was wrong with the last launch of this thread; empty when nothing was.
SIMT_API const char* simt_last_error();

// Launches are over when they return. Only ThreadSanitizer has to be told that the host has waited for them: to it, a
// kernel launched with programmatic serialization is ordered after the one before only by
// cudaGridDependencySynchronize.
SIMT_API void simt_synchronize();
