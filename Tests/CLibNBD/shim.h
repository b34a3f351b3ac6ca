/* libnbd, the NBD client that the tests on this host use: it shares no code with the server. */
#include <libnbd.h>
