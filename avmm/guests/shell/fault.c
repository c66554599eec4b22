#include "fault.h"

#include "console.h"
#include "trap.h"

void print_fault(void)
{
        print("%s", exception_name(last_fault.vector));
        if (last_fault.vector == VECTOR_PAGE)
                print(" at 0x%lx", last_fault.address);
        print(" (vector %lu, error 0x%lx)\n", last_fault.vector, last_fault.error);
}
