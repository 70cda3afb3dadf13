/* Leases the newest version of a segment and maps its slot, without Python: cc -o reader reader.c && ./reader DIRECTORY

   DIRECTORY is the segment's own, such as /dev/shm/wsync-1000/cartpole. The steps R1 to R5 are those of the protocol in
   wsync/segment/segment.py. Prints the version, the bytes of the weights and their sum modulo 2^64, and the header,
   which says where each tensor is (https://github.com/huggingface/safetensors). */

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const int WORD_OFFSET = 64, NO_SLOT = 0xFE; /* also 0xFF, a segment that was removed, has no version */

int main(int argc, char **argv) {
    char path[4096];
    if (argc != 2) return 2;
    snprintf(path, sizeof path, "%s/control", argv[1]);
    int control = open(path, O_RDONLY | O_CLOEXEC);
    const char *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, control, 0);
    if (control < 0 || page == MAP_FAILED || memcmp(page, "WSYNC\0\0\1", 8)) {
        fprintf(stderr, "%s is not a segment in this format\n", argv[1]);
        return 1;
    }
    const uint64_t *word = (const uint64_t *)(page + WORD_OFFSET);
    for (int attempt = 0; attempt < 1000; attempt++) {
        uint64_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE); /* R1 load */
        if ((int)(seen & 0xFF) >= NO_SLOT) {
            fprintf(stderr, "%s has no version yet\n", argv[1]);
            return 75;
        }
        snprintf(path, sizeof path, "%s/slot-%d.safetensors", argv[1], (int)(seen & 0xFF));
        int slot = open(path, O_RDONLY | O_CLOEXEC);
        struct stat info;
        if (slot >= 0 && !flock(slot, LOCK_SH | LOCK_NB)                 /* R2 lease */
            && __atomic_load_n(word, __ATOMIC_ACQUIRE) == seen           /* R3 recheck */
            && !fstat(slot, &info) && info.st_size >= 8) {
            const unsigned char *bytes = mmap(NULL, info.st_size, PROT_READ, MAP_SHARED, slot, 0);
            uint64_t header, sum = 0;
            if (bytes == MAP_FAILED) return 1;
            memcpy(&header, bytes, 8); /* R4 use: nobody writes this slot while the lock is held */
            if (header > (uint64_t)info.st_size - 8) return 1;
            for (uint64_t at = 8 + header; at < (uint64_t)info.st_size; at++) sum += bytes[at];
            printf("%llu %llu %llu\n%.*s\n", (unsigned long long)(seen >> 8),
                   (unsigned long long)(info.st_size - 8 - header), (unsigned long long)sum, (int)header, bytes + 8);
            return 0; /* R5 release: the kernel drops the lock with the descriptor */
        }
        if (slot >= 0) close(slot);
    }
    fprintf(stderr, "%s: the live slot is locked by somebody else\n", argv[1]);
    return 75;
}
