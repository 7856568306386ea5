#include "core.h"
#define ISA base
#define ISA_NAME "base"
#define W 4
#define MR 6
#include "core.inc"
