/* Ends a process with SIGKILL at its n-th flush of a file to the disk, just before or just after it.

   DEATH_AT=n, DEATH_AFTER=1 for after, DEATH_NOTE=file: what was being flushed is written there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int count;

static int flush(const char *name, int descriptor)
{
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    const char *at = getenv("DEATH_AT"), *after = getenv("DEATH_AFTER"), *note = getenv("DEATH_NOTE");
    if (!at || __sync_add_and_fetch(&count, 1) != atoi(at))
        return real(descriptor);
    if (after)
        real(descriptor);
    if (note) {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, path, sizeof path);
        int file = open(note, O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (file >= 0 && length > 0)
            length = write(file, path, (size_t)length);
    }
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

int fsync(int descriptor) { return flush("fsync", descriptor); }
int fdatasync(int descriptor) { return flush("fdatasync", descriptor); }
