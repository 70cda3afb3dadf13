/* Preloaded into a Python, fails the nth call of one libc function on paths below one of two directories.
 *
 * Functions go by families (open is open, open64, openat …), so that a test need not know which one a Python was built
 * with. fault_arm(family, nth, error): "*" is every family, nth 0 every call; error 0 counts only, SHORT reads or writes
 * a part. A close fails as Linux has it: the descriptor is gone.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT (-1)

static char roots[2][PATH_MAX];
static char armed[32], calls[1 << 16];
static int nth, error, seen, fired, on;

void fault_roots(const char *first, const char *second) {
    strncpy(roots[0], first, PATH_MAX - 1);
    strncpy(roots[1], second, PATH_MAX - 1);
}
void fault_arm(const char *family, int which, int code) {
    strncpy(armed, family, sizeof armed - 1);
    nth = which, error = code, seen = fired = 0, calls[0] = 0, on = 1;
}
int fault_disarm(void) { on = 0; return fired; }
const char *fault_calls(void) { return calls; }

static int below(const char *path) {
    for (int i = 0; i < 2; i++) {
        size_t n = strlen(roots[i]);
        if (n && !strncmp(path, roots[i], n) && (path[n] == '/' || !path[n])) return 1;
    }
    return 0;
}
static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}
static int at_below(int dir, const char *path) { return path[0] == '/' ? below(path) : dir != AT_FDCWD && fd_below(dir); }

/* What this call is to do: 0 go on, SHORT, or fail with errno set. */
static int due(const char *family) {
    if (strlen(calls) + strlen(family) + 2 < sizeof calls) strcat(strcat(calls, family), " ");
    if ((strcmp(armed, "*") && strcmp(family, armed)) || (nth && ++seen != nth)) return 0;
    if (!error) return 0;
    fired++;
    if (error == SHORT) return SHORT;
    errno = error;
    return error;
}
static int for_fd(const char *family, int fd) { return on && fd_below(fd) ? due(family) : 0; }
static int for_path(const char *family, int dir, const char *path) { return on && at_below(dir, path) ? due(family) : 0; }

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list ap; va_start(ap, flags); int mode = va_arg(ap, int); va_end(ap); \
        return for_path("open", AT_FDCWD, path) > 0 ? -1 : real(path, flags, mode); \
    }
OPEN(open) OPEN(open64)
#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list ap; va_start(ap, flags); int mode = va_arg(ap, int); va_end(ap); \
        return for_path("open", dir, path) > 0 ? -1 : real(dir, path, flags, mode); \
    }
OPENAT(openat) OPENAT(openat64)
#define STAT(name, kind) \
    int name(const char *path, struct kind *to) { \
        REAL(int, #name, const char *, struct kind *); \
        return for_path("stat", AT_FDCWD, path) > 0 ? -1 : real(path, to); \
    }
STAT(stat, stat) STAT(stat64, stat64) STAT(lstat, stat) STAT(lstat64, stat64)
#define STATAT(name, kind) \
    int name(int dir, const char *path, struct kind *to, int flags) { \
        REAL(int, #name, int, const char *, struct kind *, int); \
        return for_path("stat", dir, path) > 0 ? -1 : real(dir, path, to, flags); \
    }
STATAT(fstatat, stat) STATAT(fstatat64, stat64)
int statx(int dir, const char *path, int flags, unsigned mask, struct statx *to) {
    REAL(int, "statx", int, const char *, int, unsigned, struct statx *);
    return for_path("stat", dir, path) > 0 ? -1 : real(dir, path, flags, mask, to);
}
#define FSTAT(name, kind) \
    int name(int fd, struct kind *to) { \
        REAL(int, #name, int, struct kind *); \
        return for_fd("fstat", fd) > 0 ? -1 : real(fd, to); \
    }
FSTAT(fstat, stat) FSTAT(fstat64, stat64)
#define STATVFS(name, kind) \
    int name(const char *path, struct kind *to) { \
        REAL(int, #name, const char *, struct kind *); \
        return for_path("statvfs", AT_FDCWD, path) > 0 ? -1 : real(path, to); \
    }
STATVFS(statvfs, statvfs) STATVFS(statvfs64, statvfs64)
ssize_t read(int fd, void *to, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    int what = for_fd("read", fd);
    return what > 0 ? -1 : real(fd, to, what == SHORT && size > 1 ? size / 2 : size);
}
#define PREAD(name, offset) \
    ssize_t name(int fd, void *to, size_t size, offset at) { \
        REAL(ssize_t, #name, int, void *, size_t, offset); \
        int what = for_fd("pread", fd); \
        return what > 0 ? -1 : real(fd, to, what == SHORT && size > 1 ? 1 + size / 64 : size, at); \
    }
PREAD(pread, off_t) PREAD(pread64, off64_t)
#define PWRITE(name, offset) \
    ssize_t name(int fd, const void *from, size_t size, offset at) { \
        REAL(ssize_t, #name, int, const void *, size_t, offset); \
        int what = for_fd("pwrite", fd); \
        return what > 0 ? -1 : real(fd, from, what == SHORT && size > 1 ? size / 2 : size, at); \
    }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)
static void halve(const struct iovec *from, int count, struct iovec *to) {
    memcpy(to, from, sizeof *from * count);
    for (int i = 1; i < count; i++) to[i].iov_len = 0;
    if (to[0].iov_len > 1) to[0].iov_len /= 2;
}
#define PREADV(name, offset) \
    ssize_t name(int fd, const struct iovec *to, int count, offset at, int flags) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, offset, int); \
        struct iovec less[IOV_MAX]; \
        int what = for_fd("preadv", fd); \
        if (what == SHORT) halve(to, count, less); \
        return what > 0 ? -1 : real(fd, what == SHORT ? less : to, count, at, flags); \
    }
PREADV(preadv2, off_t) PREADV(preadv64v2, off64_t)
#define PREADV_PLAIN(name, offset) \
    ssize_t name(int fd, const struct iovec *to, int count, offset at) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, offset); \
        struct iovec less[IOV_MAX]; \
        int what = for_fd("preadv", fd); \
        if (what == SHORT) halve(to, count, less); \
        return what > 0 ? -1 : real(fd, what == SHORT ? less : to, count, at); \
    }
PREADV_PLAIN(preadv, off_t) PREADV_PLAIN(preadv64, off64_t)
DIR *opendir(const char *path) {
    REAL(DIR *, "opendir", const char *);
    return for_path("opendir", AT_FDCWD, path) > 0 ? NULL : real(path);
}
DIR *fdopendir(int fd) {
    REAL(DIR *, "fdopendir", int);
    return for_fd("opendir", fd) > 0 ? NULL : real(fd);
}
#define READDIR(name, kind) \
    struct kind *name(DIR *dir) { \
        REAL(struct kind *, #name, DIR *); \
        return for_fd("readdir", dirfd(dir)) > 0 ? NULL : real(dir); \
    }
READDIR(readdir, dirent) READDIR(readdir64, dirent64)
#define FCNTL(name) \
    int name(int fd, int command, ...) { \
        REAL(int, #name, int, int, ...); \
        va_list ap; va_start(ap, command); void *argument = va_arg(ap, void *); va_end(ap); \
        return for_fd("fcntl", fd) > 0 ? -1 : real(fd, command, argument); \
    }
FCNTL(fcntl) FCNTL(fcntl64)
int flock(int fd, int how) {
    REAL(int, "flock", int, int);
    return for_fd("flock", fd) > 0 ? -1 : real(fd, how);
}
#define MMAP(name, offset) \
    void *name(void *to, size_t size, int protection, int flags, int fd, offset at) { \
        REAL(void *, #name, void *, size_t, int, int, int, offset); \
        return fd >= 0 && for_fd("mmap", fd) > 0 ? MAP_FAILED : real(to, size, protection, flags, fd, at); \
    }
MMAP(mmap, off_t) MMAP(mmap64, off64_t)
#define FALLOCATE(name, offset) \
    int name(int fd, offset at, offset size) { \
        REAL(int, #name, int, offset, offset); \
        int what = for_fd("fallocate", fd); \
        return what > 0 ? what : real(fd, at, size); \
    }
FALLOCATE(posix_fallocate, off_t) FALLOCATE(posix_fallocate64, off64_t)
#define FTRUNCATE(name, offset) \
    int name(int fd, offset size) { \
        REAL(int, #name, int, offset); \
        return for_fd("ftruncate", fd) > 0 ? -1 : real(fd, size); \
    }
FTRUNCATE(ftruncate, off_t) FTRUNCATE(ftruncate64, off64_t)
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return for_path("rename", AT_FDCWD, to) > 0 ? -1 : real(from, to);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return for_path("unlink", AT_FDCWD, path) > 0 ? -1 : real(path);
}
int unlinkat(int dir, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return for_path("unlink", dir, path) > 0 ? -1 : real(dir, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return for_path("mkdir", AT_FDCWD, path) > 0 ? -1 : real(path, mode);
}
int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    return for_path("mkdir", dir, path) > 0 ? -1 : real(dir, path, mode);
}
int close(int fd) {
    REAL(int, "close", int);
    int what = for_fd("close", fd), done;
    done = real(fd);
    if (what > 0) errno = what;
    return what > 0 ? -1 : done;
}
