// What a thread that waits can do for one that the operating system keeps from running: give it its own processor.
//
// A worker beside a busy neighbour is suspended in the middle of an item for a whole time slice, and everybody waits for
// that item. Whoever waits sees that the other gets no processor time, and pulls it over; the other finishes its item
// there, and then goes back to stand in line at its own processor, where it holds nothing that anybody needs:
//
//     processor 0   worker 0: item ..| neighbour                       | worker 0
//     processor 1   worker 1 waits   | worker 0: rest of item | worker 1 does all items
//
// Linux only; elsewhere nobody is ever found suspended.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace kvik {

class Placement {
 public:
  // By the thread that may be pulled, from `attach` to `detach`:
  void attach();
  bool pulled() const;  // then it is to `leave` this processor as soon as it holds nothing
  void leave();
  void detach();  // it runs where it may, and stays here

  // By others, in between:
  int64_t cpu_time() const;  // that it has got so far, in ns, up to date even while it runs; -1 if unknown
  bool pull();               // to the caller's processor; whether it was asked to come

 private:
#if defined(__linux__)
  enum State { kDetached, kFree, kPulling, kPulled };
  std::atomic<pid_t> thread_{0};  // and the clock may be read while the next caller attaches
  std::atomic<clockid_t> clock_{0};
  cpu_set_t allowed_{};  // valid while it is pulled
  std::atomic<int> state_{kDetached};
#endif
};

int usable_processors();  // by the calling thread; 0 if unknown

}  // namespace kvik
