#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 gridDim;

namespace emulation {

namespace {

// Waiting fibers leave when as many as belong to the barrier have arrived.
struct Barrier {
  int members = 0, arrived = 0, generation = 0;
};
// One CUDA thread. It outlives its block: the next block's thread of this index goes on in it.
// setjmp and longjmp switch to and fro; ucontext only makes the stack (its switch is a system
// call).
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  bool started = false, done = true;
  int passed_barriers = 0;  // of the block
};

constexpr size_t kStackBytes = 64 * 1024;
std::vector<std::unique_ptr<Fiber>> fibers;
jmp_buf scheduler;
std::vector<double> exchanged;
std::vector<Barrier> warps;
Barrier block;
int current;
const std::function<void()>* body;

void give_way() {
  if (_setjmp(fibers[current]->resume) == 0) _longjmp(scheduler, 1);
}

void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) give_way();
}

void fiber_main() {
  for (;;) {
    (*body)();
    fibers[current]->done = true;
    give_way();
  }
}

void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  fiber.stack = std::make_unique<char[]>(kStackBytes);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, fiber_main, 0);
  fiber.started = true;
  setcontext(&context);
}

// Runs the current fiber until it gives way.
void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (!fiber.started) start(fiber);
  _longjmp(fiber.resume, 1);
}

bool can_run(const Fiber& fiber) {
  return !fiber.done && fiber.passed_barriers <= block.generation;
}

// Each warp runs as far as it can before the next one does, so that what a barrier is missing for
// happens: a fast warp overwrites what a slow one has yet to read.
void run_block(int threads) {
  block = {threads, 0, 0};
  warps.assign((threads + 31) / 32, {32, 0, 0});
  for (int i = 0; i < threads; ++i) fibers[i]->done = false, fibers[i]->passed_barriers = 0;
  int left = threads, warp = 0;
  for (int turns = 0; left > 0; ++turns) {
    if (turns > 1000000) std::abort();  // threads wait for each other: a deadlock on a GPU
    bool ran = false;
    for (int i = warp * 32; i < warp * 32 + 32 && i < threads; ++i) {
      if (!can_run(*fibers[i])) continue;
      current = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      resume(*fibers[i]);
      if (fibers[i]->done) --left;
      ran = true;
    }
    if (!ran) warp = (warp + 1) % static_cast<int>(warps.size());
  }
}

}  // namespace

void block_barrier() {
  ++fibers[current]->passed_barriers;
  wait(block);
}

double from_lane(double value, int lane) {
  const int warp = threadIdx.x / 32;
  exchanged[threadIdx.x] = value;
  wait(warps[warp]);
  const double other = exchanged[warp * 32 + lane];
  wait(warps[warp]);
  return other;
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  while (static_cast<int>(fibers.size()) < launch.threads) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  exchanged.assign(launch.threads, 0);
  body = &kernel;
  gridDim = launch.grid;
  for (unsigned y = 0; y < launch.grid.y; ++y) {
    for (unsigned x = 0; x < launch.grid.x; ++x) {
      blockIdx = {x, y, 0};
      run_block(launch.threads);
    }
  }
}

}  // namespace emulation

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
