//! Who the two ends of a direct connection are: a key for each, made for one move.
//!
//! TLS 1.3 (RFC 8446) with raw public keys (RFC 7250) of Ed25519, at both ends. There is no
//! certificate, as there is nobody who could vouch for a key better than the ssh through which it came.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ring::aead::{
    AES_128_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring as provider,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, alg_id,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, public_key_to_spki};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    Error as TlsError, ServerConfig, ServerConnection, SignatureScheme, SupportedCipherSuite,
};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::hexadecimal::{self, NotHexadecimal};

/// How much is encrypted to see how long that takes, in bytes, and how often.
const SEALED: usize = 16 << 10;
const TIMES: u32 = 4;

/// What one end of a move is known by: an Ed25519 key, written as hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key of these bytes (RFC 8032). Whether it is one shows once somebody signs by it.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// As TLS shows it.
    fn to_info(self) -> SubjectPublicKeyInfoDer<'static> {
        public_key_to_spki(&alg_id::ED25519, self.0)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal::format(&self.0))
    }
}

impl TryFrom<String> for PublicKey {
    type Error = NotHexadecimal;

    fn try_from(text: String) -> Result<Self, NotHexadecimal> {
        hexadecimal::parse(&text).map(Self)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        hexadecimal::format(&key.0)
    }
}

/// One end's key, with its secret: it is nowhere but in this process's memory.
pub struct Identity {
    public: PublicKey,
    shown: Arc<CertifiedKey>,
    provider: CryptoProvider,
}

impl Identity {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::Refused`] where no key can be made.
    pub fn new() -> Result<Self> {
        let failed = |why: &dyn fmt::Display| Error::Refused(format!("Can't make a key: {why}"));
        let secret =
            Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|error| failed(&error))?;
        let pair = Ed25519KeyPair::from_pkcs8(secret.as_ref()).map_err(|error| failed(&error))?;
        let public = pair.public_key().as_ref().try_into();
        let public = PublicKey(public.map_err(|error| failed(&error))?);
        let secret = PrivatePkcs8KeyDer::from(secret.as_ref().to_vec());
        let key = provider::sign::any_eddsa_type(&secret).map_err(|error| failed(&error))?;
        let info = CertificateDer::from(public.to_info().to_vec());
        Ok(Identity {
            public,
            shown: Arc::new(CertifiedKey::new(vec![info], key)),
            provider: provider::default_provider(),
        })
    }

    /// What the other end is to be told.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// This end of connections to whoever has that key.
    pub(super) fn client(&self, peer: PublicKey) -> Result<Client> {
        let failed = |error| Error::Refused(format!("Can't begin TLS: {error}"));
        // The server takes the client's first choice.
        let provider = CryptoProvider {
            cipher_suites: fastest_first(),
            ..self.provider.clone()
        };
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.only(peer)))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                Arc::clone(&self.shown),
            )));
        config.resumption = Resumption::disabled();
        Ok(Client(Arc::new(config)))
    }

    /// This end of connections that whoever has that key opens.
    pub(super) fn server(&self, peer: PublicKey) -> Result<Server> {
        let failed = |error| Error::Refused(format!("Can't begin TLS: {error}"));
        let mut config = ServerConfig::builder_with_provider(Arc::new(self.provider.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(Arc::new(self.only(peer)))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
                Arc::clone(&self.shown),
            )));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Server(Arc::new(config)))
    }

    fn only(&self, peer: PublicKey) -> Only {
        Only {
            info: peer.to_info(),
            algorithms: self.provider.signature_verification_algorithms,
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?})", self.public)
    }
}

/// What may encrypt a connection, the fastest one here first: it is the source that chooses, and that
/// encrypts. Processors without instructions for AES, and emulated ones, are several times slower by
/// it.
fn fastest_first() -> Vec<SupportedCipherSuite> {
    let mut suites = [
        (
            &AES_128_GCM,
            provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ),
        (
            &CHACHA20_POLY1305,
            provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ),
    ];
    suites.sort_by_cached_key(|(algorithm, _)| time_to_seal(algorithm));
    suites.map(|(_, suite)| suite).to_vec()
}

/// How long encrypting some KiB takes, the best of a few times; for ever where it can't be done.
fn time_to_seal(algorithm: &'static Algorithm) -> Duration {
    let Ok(key) = UnboundKey::new(algorithm, &[0; 32][..algorithm.key_len()]) else {
        return Duration::MAX;
    };
    let (key, mut bytes) = (LessSafeKey::new(key), [0; SEALED]);
    let times = (0..TIMES).map(|_| {
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let start = Instant::now();
        match key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut bytes) {
            Ok(_) => start.elapsed(),
            Err(_) => Duration::MAX,
        }
    });
    let best = times.min().unwrap_or(Duration::MAX);
    log::debug!("{algorithm:?} takes {best:?} for {SEALED} bytes");
    best
}

/// The end that connects.
pub(super) struct Client(Arc<ClientConfig>);

impl Client {
    pub(super) fn connection(
        &self,
        address: IpAddr,
    ) -> std::result::Result<ClientConnection, TlsError> {
        ClientConnection::new(Arc::clone(&self.0), ServerName::IpAddress(address.into()))
    }
}

/// The end that listens.
#[derive(Clone)]
pub(super) struct Server(Arc<ServerConfig>);

impl Server {
    pub(super) fn connection(&self) -> std::result::Result<ServerConnection, TlsError> {
        ServerConnection::new(Arc::clone(&self.0))
    }
}

/// Takes one key, and no other.
#[derive(Debug)]
struct Only {
    info: SubjectPublicKeyInfoDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Only {
    fn check(&self, shown: &CertificateDer<'_>) -> std::result::Result<(), TlsError> {
        match shown.as_ref() == self.info.as_ref() {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        let info = SubjectPublicKeyInfoDer::from(shown.as_ref());
        verify_tls13_signature_with_raw_key(message, &info, signature, &self.algorithms)
    }
}

/// TLS 1.2 has no raw keys here, and is not spoken.
fn too_old() -> TlsError {
    TlsError::General("TLS 1.2 is not spoken".into())
}

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, TlsError> {
        self.check(shown).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _shown: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, shown, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Only {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, TlsError> {
        self.check(shown).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _shown: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, shown, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
