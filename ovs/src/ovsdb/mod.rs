//! OVSDB (RFC 7047) with one database server.
