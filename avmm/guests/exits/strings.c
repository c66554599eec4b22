/*
 * String accesses: REP OUTS and REP INS. Here the clock runs only during the instruction, because
 * filling or summing the buffer takes as long as the access itself. Writes write the running index
 * of the element.
 */
#include "cpu.h"
#include "job.h"

static union {
        uint8_t of_1[STRING_BYTES];
        uint16_t of_2[STRING_BYTES / 2];
        uint32_t of_4[STRING_BYTES / 4];
} buffer;

static void rep_outs(const struct job *job)
{
        const void *from = &buffer;
        uint64_t left = job->string;

        switch (job->width) {
        case 1:
                asm volatile("rep outsb" : "+S"(from), "+c"(left) : "d"(job->where) : "memory");
                break;
        case 2:
                asm volatile("rep outsw" : "+S"(from), "+c"(left) : "d"(job->where) : "memory");
                break;
        default:
                asm volatile("rep outsl" : "+S"(from), "+c"(left) : "d"(job->where) : "memory");
        }
}

static void rep_ins(const struct job *job)
{
        void *to = &buffer;
        uint64_t left = job->string;

        switch (job->width) {
        case 1:
                asm volatile("rep insb" : "+D"(to), "+c"(left) : "d"(job->where) : "memory");
                break;
        case 2:
                asm volatile("rep insw" : "+D"(to), "+c"(left) : "d"(job->where) : "memory");
                break;
        default:
                asm volatile("rep insl" : "+D"(to), "+c"(left) : "d"(job->where) : "memory");
        }
}

static uint64_t element(const struct job *job, uint64_t i)
{
        return job->width == 1 ? buffer.of_1[i] :
               job->width == 2 ? buffer.of_2[i] : buffer.of_4[i];
}

static void set_element(const struct job *job, uint64_t i, uint64_t value)
{
        if (job->width == 1)
                buffer.of_1[i] = value;
        else if (job->width == 2)
                buffer.of_2[i] = value;
        else
                buffer.of_4[i] = value;
}

void string_out(void *argument)
{
        struct job *job = argument;
        uint64_t index = 0;

        job->cycles = job->sum = 0;
        for (uint64_t n = 0; n < job->count; n++) {
                uint64_t begin;

                for (uint64_t i = 0; i < job->string; i++)
                        set_element(job, i, index++);
                begin = tsc();
                rep_outs(job);
                job->cycles += tsc() - begin;
        }
}

void string_in(void *argument)
{
        struct job *job = argument;

        job->cycles = job->sum = 0;
        for (uint64_t n = 0; n < job->count; n++) {
                const uint64_t begin = tsc();

                rep_ins(job);
                job->cycles += tsc() - begin;
                for (uint64_t i = 0; i < job->string; i++)
                        job->sum += element(job, i);
        }
}
