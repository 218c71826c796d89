// What the stand-in runtime (cudart.cpp) offers beside CUDA's functions, to the host build of the project's
// kernels (runtime.cpp) and to Python (device.py).
#pragma once

#include <cstddef>

extern "C" {

// Work of a kernel or an operator. Answers a cudaError_t.
using StandinWork = int (*)(void* context);
using StandinDrop = void (*)(void* context);

enum StandinAnswer { kStandinRunNow = 0, kStandinRecorded = -1 };

// Says of work on a stream: to be run now; recorded in the graph that is captured on it, and run at each
// replay (then `drop` ends the context); or an error of CUDA's, positive.
int standin_enqueue(void* stream, StandinWork work, StandinDrop drop, void* context);

// Whether a kernel on this stream may have these parameters: an error of CUDA's if the stream is of a device
// that is not current, or if a parameter holds an address on another device.
int standin_check_launch(void* stream, const char* name, const void* const* parameters,
                         const std::size_t* sizes, int count);

// The error that is returned next is told with these words.
void standin_explain(const char* words);

// Answers the error, told with these words, and keeps it as the last one.
int standin_refuse(int error, const char* words);
}
