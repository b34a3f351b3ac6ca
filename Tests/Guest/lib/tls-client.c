// An NBD client that ends its TLS in ways that no other does. Over TCP to 127.0.0.1:10809, export
// "home", without looking at the server's certificate.
//
//   tls-client goodbye          says close_notify between two requests, and expects the same
//   tls-client hangup           closes the socket between two requests
//   tls-client torn             closes it in the middle of a request
//   tls-client rekey            renews its keys, and expects that the server hangs up
//   tls-client rekey-and-go-on  renews its keys, and expects that everything works
#include <arpa/inet.h>
#include <gnutls/gnutls.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int wire;
static gnutls_session_t session;

static void check(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "tls-client: %s\n", what);
    exit(1);
}

static void plain_read(void *bytes, size_t count) {
    check(recv(wire, bytes, count, MSG_WAITALL) == (ssize_t)count, "the server is silent");
}

static int tls_read(void *bytes, size_t count) {
    int interruptions = 0;                      // as by the server's new keys
    for (size_t done = 0; done < count;) {
        ssize_t result = gnutls_record_recv(session, (char *)bytes + done, count - done);
        if (result == GNUTLS_E_AGAIN && interruptions++ < 5) continue;
        if (result <= 0) return (int)result;
        done += result;
    }
    return 1;
}

static void tls_write(const void *bytes, size_t count) {
    check(gnutls_record_send(session, bytes, count) == (ssize_t)count, "cannot send");
}

// 28 bytes: magic, flags, type, cookie, offset, length.
static void request(uint16_t type, uint32_t length) {
    unsigned char bytes[28] = {0x25, 0x60, 0x95, 0x13, 0, 0, type >> 8, type};
    for (int i = 0; i < 4; i++) bytes[24 + i] = length >> (24 - 8 * i);
    tls_write(bytes, sizeof bytes);
}

static void connect_and_enter(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(10809)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    wire = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval patience = {.tv_sec = 20};
    setsockopt(wire, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    check(connect(wire, (struct sockaddr *)&address, sizeof address) == 0, "cannot connect");
    char greeting[18], answer[20];
    plain_read(greeting, sizeof greeting);
    static const char start[] = "\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0\0";
    check(write(wire, start, sizeof start - 1) == sizeof start - 1, "cannot send");
    plain_read(answer, sizeof answer);

    gnutls_certificate_credentials_t credentials;
    gnutls_certificate_allocate_credentials(&credentials);
    gnutls_init(&session, GNUTLS_CLIENT);
    gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, credentials);
    gnutls_set_default_priority(session);
    gnutls_transport_set_int(session, wire);
    check(gnutls_handshake(session) == 0, "the TLS handshake failed");

    static const char go[] = "IHAVEOPT\0\0\0\7\0\0\0\12\0\0\0\4home\0\0";
    tls_write(go, sizeof go - 1);
    unsigned char reply[20], rest[4096];
    do {
        check(tls_read(reply, sizeof reply) > 0, "no answer to GO");
        unsigned length = reply[18] << 8 | reply[19];
        check(tls_read(rest, length) > 0 || length == 0, "half of an answer to GO");
        check(reply[12] == 0, "GO is refused");
    } while (reply[15] != 1);
}

static int read_one(void) {
    static char reply[16 + 4096];
    request(0, 4096);
    return tls_read(reply, sizeof reply);
}

int main(int count, char **words) {
    check(count == 2, "say how to end");
    const char *end = words[1];
    connect_and_enter();
    check(read_one() > 0, "the first read fails");
    char byte;
    if (strcmp(end, "goodbye") == 0) {
        check(gnutls_bye(session, GNUTLS_SHUT_WR) == 0, "cannot say goodbye");
        check(gnutls_record_recv(session, &byte, 1) == 0, "the server says no goodbye");
    } else if (strcmp(end, "torn") == 0) {
        request(1, 4096);
    } else if (strcmp(end, "rekey") == 0) {
        check(gnutls_session_key_update(session, 0) == 0, "no new keys");
        check(read_one() <= 0, "the server has understood the new keys");
    } else if (strcmp(end, "rekey-and-go-on") == 0) {
        for (int round = 0; round < 3; round++) {
            check(gnutls_session_key_update(session, GNUTLS_KU_PEER) == 0, "no new keys");
            check(read_one() > 0, "the server has not understood the new keys");
        }
    } else {
        check(strcmp(end, "hangup") == 0, "unknown end");
    }
    close(wire);
    return 0;
}
