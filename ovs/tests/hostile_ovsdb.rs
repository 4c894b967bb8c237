//! A database server that sends what none should: the client ends that connection, tells whoever
//! waits, and tries again.

use std::time::Duration;

use lifeboat_ovs::Endpoint;
use lifeboat_ovs::ovsdb::{Client, ClientError, RequestError, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::test]
async fn garbage_ends_the_connection_and_not_the_client() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
    let settings = Settings {
        message_limit: 4096,
        backoff_max: Duration::from_millis(100),
        ..Settings::default()
    };
    let client = Client::start(endpoint, settings);
    let oversized = [br#"{"id":1,"result":""#.as_slice(), &[b'x'; 8192]].concat();
    let answers: [&[u8]; 4] = [b"[]", b"{\"id\":1,}", &oversized, b"{\"id\":"];
    for answer in answers {
        let (mut server, _) = listener.accept().await.unwrap();
        client.connected(PATIENCE).await.unwrap();
        let asking = tokio::join!(client.transact(&[], PATIENCE), async {
            let mut request = [0; 1024];
            let read = server.read(&mut request).await.unwrap();
            assert!(read > 0);
            server.write_all(answer).await.unwrap();
            drop(server);
        });
        assert_eq!(asking.0, Err(ClientError::Request(RequestError::Disconnected)), "{answer:?}");
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_a_deadline_and_no_more() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
    let client = Client::start(endpoint, Settings::default());
    let (_server, _) = listener.accept().await.unwrap();
    client.connected(PATIENCE).await.unwrap();
    let within = Duration::from_millis(50);
    let late = client.transact(&[], within).await;
    assert_eq!(late, Err(ClientError::Request(RequestError::TimedOut { within })));
}
