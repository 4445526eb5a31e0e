// SPDX-License-Identifier: Apache-2.0
// libstdc++'s shared_ptr reads this variable of glibc 2.32 and later, and counts without atomic operations where it
// says that the process has a single thread. It is all in the extension that glibc 2.28, the oldest that torch runs
// on, does not have. With a variable of its own, which says that there may be other threads, as is always safe, an
// extension that was built on a newer system loads there, too.
#if defined(__linux__)
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif
