/* Counts what changes a folder and the files below it, by whichever library of this process, and has one of these events fail or
   bring a signal. What a library calls in the C library is called here first: its table of addresses is changed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__)
#define IS_ADDRESS(type) ((type) == R_X86_64_GLOB_DAT || (type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_64)
#elif defined(__aarch64__)
#define IS_ADDRESS(type) ((type) == R_AARCH64_GLOB_DAT || (type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_ABS64)
#else
#error "relocations of this processor are not known here"
#endif

static char folder[PATH_MAX];
static size_t folder_length;
static int log_descriptor = -1, at_signal, at_errno;
static long at, seen;
static __thread int busy;

/* Return the path that `path`, relative to a directory that is open, stands for; `found` has room for it. */
static const char *absolute(int directory, const char *path, char *found) {
    char link[64];
    ssize_t length;
    if (path[0] == '/') return path;
    if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    length = readlink(link, found, PATH_MAX - 1);
    if (length < 0) return path;
    snprintf(found + length, PATH_MAX - length, "/%s", path);
    return found;
}

/* Return whether an event fails; count it, if it is below the folder, and send the signal if it is the one. */
static int event(const char *what, const char *path) {
    char line[PATH_MAX + 64];
    long number;
    int length, kept = errno;
    if (busy || log_descriptor < 0 || strncmp(path, folder, folder_length)) return 0;
    if (path[folder_length] != '/' && path[folder_length]) return 0;
    busy = 1;
    number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    length = snprintf(line, sizeof line, "event: %s %s\n", what, path[folder_length] ? path + folder_length + 1 : ".");
    if (write(log_descriptor, line, length) < 0) abort();
    if (number == at && at_signal) kill(getpid(), at_signal);
    busy = 0;
    errno = kept;
    if (number != at || !at_errno) return 0;
    errno = at_errno;
    return 1;
}

static int event_at(const char *what, int directory, const char *path) {
    char found[PATH_MAX];
    return log_descriptor >= 0 && event(what, absolute(directory, path, found));
}

static int event_of(const char *what, int descriptor) {
    char link[64], found[PATH_MAX];
    ssize_t length;
    int kept = errno;
    if (log_descriptor < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, found, sizeof found - 1);
    errno = kept;
    if (length < 0) return 0;
    found[length] = 0;
    return event(what, found);
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

#define MODE(flags) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

static int our_open(const char *path, int flags, ...) {
    MODE(flags)
    return writes(flags) && event_at("open", AT_FDCWD, path) ? -1 : open(path, flags, mode);
}
static int our_openat(int directory, const char *path, int flags, ...) {
    MODE(flags)
    return writes(flags) && event_at("open", directory, path) ? -1 : openat(directory, path, flags, mode);
}
static int our_creat(const char *path, mode_t mode) {
    return event_at("open", AT_FDCWD, path) ? -1 : creat(path, mode);
}
static FILE *our_fopen(const char *path, const char *how) {
    return strpbrk(how, "wax+") && event_at("open", AT_FDCWD, path) ? NULL : fopen(path, how);
}
static ssize_t our_write(int file, const void *from, size_t count) {
    return event_of("write", file) ? -1 : write(file, from, count);
}
static ssize_t our_writev(int file, const struct iovec *from, int count) {
    return event_of("write", file) ? -1 : writev(file, from, count);
}
static ssize_t our_pwrite(int file, const void *from, size_t count, off_t place) {
    return event_of("write", file) ? -1 : pwrite(file, from, count, place);
}
static ssize_t our_sendfile(int to, int from, off_t *place, size_t count) {
    return event_of("write", to) ? -1 : sendfile(to, from, place, count);
}
static ssize_t our_copy(int from, off_t *start, int to, off_t *place, size_t count, unsigned flags) {
    return event_of("write", to) ? -1 : copy_file_range(from, start, to, place, count, flags);
}
static int our_truncate(int file, off_t length) { return event_of("truncate", file) ? -1 : ftruncate(file, length); }
static int our_fsync(int file) { return event_of("fsync", file) ? -1 : fsync(file); }
static int our_fdatasync(int file) { return event_of("fsync", file) ? -1 : fdatasync(file); }
static int our_rename(const char *from, const char *to) {
    return event_at("rename", AT_FDCWD, from) ? -1 : rename(from, to);
}
static int our_renameat(int one, const char *from, int other, const char *to) {
    return event_at("rename", one, from) ? -1 : renameat(one, from, other, to);
}
int our_renameat2(int one, const char *from, int other, const char *to, unsigned flags) {
    return event_at("renameat2", one, from) ? -1 : renameat2(one, from, other, to, flags);
}
static int our_link(const char *from, const char *to) { return event_at("link", AT_FDCWD, to) ? -1 : link(from, to); }
static int our_linkat(int one, const char *from, int other, const char *to, int flags) {
    return event_at("link", other, to) ? -1 : linkat(one, from, other, to, flags);
}
static int our_unlink(const char *path) { return event_at("unlink", AT_FDCWD, path) ? -1 : unlink(path); }
static int our_unlinkat(int directory, const char *path, int flags) {
    return event_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, path) ? -1 : unlinkat(directory, path, flags);
}
static int our_rmdir(const char *path) { return event_at("rmdir", AT_FDCWD, path) ? -1 : rmdir(path); }
static int our_mkdir(const char *path, mode_t mode) {
    return event_at("mkdir", AT_FDCWD, path) ? -1 : mkdir(path, mode);
}
static int our_mkdirat(int directory, const char *path, mode_t mode) {
    return event_at("mkdir", directory, path) ? -1 : mkdirat(directory, path, mode);
}

static const struct { const char *name; void *ours; } functions[] = {
    {"open", our_open}, {"open64", our_open}, {"openat", our_openat}, {"openat64", our_openat},
    {"creat", our_creat}, {"creat64", our_creat}, {"fopen", our_fopen}, {"fopen64", our_fopen},
    {"write", our_write}, {"writev", our_writev}, {"pwrite", our_pwrite}, {"pwrite64", our_pwrite},
    {"sendfile", our_sendfile}, {"sendfile64", our_sendfile}, {"copy_file_range", our_copy},
    {"ftruncate", our_truncate}, {"ftruncate64", our_truncate}, {"fsync", our_fsync}, {"fdatasync", our_fdatasync},
    {"rename", our_rename}, {"renameat", our_renameat}, {"renameat2", our_renameat2},
    {"link", our_link}, {"linkat", our_linkat}, {"unlink", our_unlink}, {"unlinkat", our_unlinkat},
    {"rmdir", our_rmdir}, {"mkdir", our_mkdir}, {"mkdirat", our_mkdirat},
};

static int changed; /* addresses in tables of libraries */

static void change_table(ElfW(Addr) base, const ElfW(Rela) *entry, size_t size, const ElfW(Sym) *symbols, const char *text) {
    size_t page = sysconf(_SC_PAGESIZE);
    for (size_t count = size / sizeof *entry; count--; entry++) {
        const char *name = text + symbols[ELF64_R_SYM(entry->r_info)].st_name;
        if (!IS_ADDRESS(ELF64_R_TYPE(entry->r_info))) continue;
        for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
            void **place = (void **)(base + entry->r_offset);
            if (strcmp(name, functions[i].name)) continue;
            if (mprotect((void *)((size_t)place & -page), page, PROT_READ | PROT_WRITE)) abort();
            *place = functions[i].ours;
            changed++;
        }
    }
}

static int change_library(struct dl_phdr_info *library, size_t size, void *own) {
    ElfW(Dyn) *dynamic = NULL;
    const ElfW(Sym) *symbols = NULL;
    const char *text = NULL;
    const ElfW(Rela) *lazy = NULL, *other = NULL;
    size_t lazy_size = 0, other_size = 0;
    const char *name = strrchr(library->dlpi_name, '/');
    (void)size;
    if (library->dlpi_addr == (ElfW(Addr))own || strstr(library->dlpi_name, "linux-vdso")) return 0;
    if (name && (!strncmp(name, "/libc.so", 8) || !strncmp(name, "/ld-linux", 9))) return 0;
    for (int i = 0; i < library->dlpi_phnum; i++)
        if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
            dynamic = (ElfW(Dyn) *)(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        void *value = (void *)dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_SYMTAB) symbols = value;
        if (dynamic->d_tag == DT_STRTAB) text = value;
        if (dynamic->d_tag == DT_JMPREL) lazy = value;
        if (dynamic->d_tag == DT_RELA) other = value;
        if (dynamic->d_tag == DT_PLTRELSZ) lazy_size = dynamic->d_un.d_val;
        if (dynamic->d_tag == DT_RELASZ) other_size = dynamic->d_un.d_val;
    }
    if (!symbols || !text) return 0;
    if (lazy) change_table(library->dlpi_addr, lazy, lazy_size, symbols, text);
    if (other) change_table(library->dlpi_addr, other, other_size, symbols, text);
    return 0;
}

static int count_loaded(struct dl_phdr_info *library, size_t size, void *loaded) {
    (void)size;
    *(unsigned long long *)loaded = library->dlpi_adds;
    return 1;
}

/* Begin to count; at event `number` (from 0) comes a signal or an error, if one of them is not 0. Nothing is counted
   where `log` is -1. Return how many addresses were changed. */
int watch(const char *path, int log, long number, int with_signal, int with_errno) {
    static unsigned long long known; /* libraries that had been loaded when the tables were changed */
    unsigned long long loaded = 0;
    Dl_info own;
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    at = number, at_signal = with_signal, at_errno = with_errno, log_descriptor = log;
    dl_iterate_phdr(count_loaded, &loaded);
    if (loaded != known && dladdr((void *)watch, &own)) {
        changed = 0;
        dl_iterate_phdr(change_library, own.dli_fbase);
        known = loaded;
    }
    return changed;
}
