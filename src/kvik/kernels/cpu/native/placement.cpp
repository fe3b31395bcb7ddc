// See placement.hpp.
#include "placement.hpp"

#if defined(__linux__)
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace kvik {

#if defined(__linux__)

void Placement::attach() {
  clockid_t clock;
  thread_ = pthread_getcpuclockid(pthread_self(), &clock) == 0 ? pid_t(syscall(SYS_gettid)) : 0;
  if (thread_ != 0) clock_ = clock;
  state_.store(kFree, std::memory_order_release);
}

int64_t Placement::cpu_time() const {
  timespec time;
  if (thread_ == 0 || clock_gettime(clock_, &time) != 0) return -1;
  return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

bool Placement::pull() {
  int expected = kFree, cpu = sched_getcpu();
  if (cpu < 0 || !state_.compare_exchange_strong(expected, kPulling, std::memory_order_acq_rel)) return false;
  cpu_set_t here;
  CPU_ZERO(&here);
  CPU_SET(cpu, &here);
  bool done = sched_getaffinity(thread_, sizeof allowed_, &allowed_) == 0 &&
              sched_setaffinity(thread_, sizeof here, &here) == 0;
  state_.store(done ? kPulled : kFree, std::memory_order_release);
  return done;
}

bool Placement::pulled() const { return state_.load(std::memory_order_acquire) == kPulled; }

void Placement::leave() {
  if (!pulled()) return;
  cpu_set_t elsewhere = allowed_;
  int cpu = sched_getcpu();
  if (cpu >= 0) CPU_CLR(cpu, &elsewhere);
  if (CPU_COUNT(&elsewhere) > 0) sched_setaffinity(0, sizeof elsewhere, &elsewhere);
  sched_setaffinity(0, sizeof allowed_, &allowed_);
  state_.store(kFree, std::memory_order_release);
}

void Placement::detach() {
  int state = kFree;
  while (!state_.compare_exchange_weak(state, kDetached, std::memory_order_acq_rel)) {
    if (state == kPulled) {
      sched_setaffinity(0, sizeof allowed_, &allowed_);
      state_.store(kFree, std::memory_order_release);
    } else if (state == kPulling) {
      sched_yield();
    }
    state = kFree;
  }
}

int usable_processors() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 0;
}

#else

int usable_processors() { return 0; }
void Placement::attach() {}
int64_t Placement::cpu_time() const { return -1; }
bool Placement::pull() { return false; }
bool Placement::pulled() const { return false; }
void Placement::leave() {}
void Placement::detach() {}

#endif

}  // namespace kvik
