// One bug for each tool of compute-sanitizer, to show that the tool sees it on this machine.
//
//   nvcc -arch=native -lineinfo -o planted planted.cu && ./planted memcheck|racecheck|initcheck|synccheck

#include <cstdio>
#include <cstring>

constexpr int kThreads = 128;

// memcheck: the last thread stores behind the end.
__global__ void out_of_bounds(int* out) { out[threadIdx.x + (threadIdx.x == kThreads - 1 ? 1 << 12 : 0)] = 1; }

// racecheck: a neighbour's value is read without waiting for it, across warps.
__global__ void race(int* out) {
    __shared__ int shared[kThreads];
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[(threadIdx.x + 37) % kThreads];
}

// initcheck: memory that nobody has written is read.
__global__ void uninitialised(int* out, const int* in) { out[threadIdx.x] = in[threadIdx.x] + 1; }

// synccheck: not every thread of the block comes to the barrier.
__global__ void divergent(int* out) {
    if (threadIdx.x < kThreads - 16) {
        out[threadIdx.x] = threadIdx.x;
        __syncthreads();
    }
}

int main(int argc, char** argv) {
    const char* bug = argc > 1 ? argv[1] : "";
    int *out = nullptr, *in = nullptr;
    cudaMalloc(&out, kThreads * sizeof(int));
    cudaMalloc(&in, kThreads * sizeof(int));
    cudaMemset(out, 0, kThreads * sizeof(int));
    if (!strcmp(bug, "memcheck")) out_of_bounds<<<1, kThreads>>>(out);
    else if (!strcmp(bug, "racecheck")) race<<<1, kThreads>>>(out);
    else if (!strcmp(bug, "initcheck")) uninitialised<<<1, kThreads>>>(out, in);
    else if (!strcmp(bug, "synccheck")) divergent<<<1, kThreads>>>(out);
    else return 2;
    cudaError_t error = cudaDeviceSynchronize();
    std::printf("%s: %s\n", bug, cudaGetErrorString(error));
    cudaFree(in);
    cudaFree(out);
    return 0;
}
