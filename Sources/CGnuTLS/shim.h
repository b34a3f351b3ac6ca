/* GnuTLS, and functions for two of its variables, which Swift cannot know to be constant. */
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

/* Memory that GnuTLS frees, and memory that GnuTLS has allocated. */
static inline void *cgnutls_allocate(size_t length) { return gnutls_malloc(length); }
static inline void cgnutls_free(void *memory) { gnutls_free(memory); }
