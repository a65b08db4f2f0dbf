#include "isa.h"

#include "register.h"

namespace efftune {

static const Register registered_limit("limit_isa", [](Call& call) {
    int level = 0;
    call.read(level);
    call.run([&] { isa_limit = level; });
});

}  // namespace efftune
