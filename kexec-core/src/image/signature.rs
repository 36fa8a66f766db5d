//! The signature in an image (Authenticode: a PE file's certificate table), verified.
//!
//! What is checked, in this order:
//! 1. the digest of the file, all of it but the checksum, the table's own entry and the table, is the one that was signed: one changed bit is
//!    enough to refuse;
//! 2. the signature (RSA, PKCS #1 v1.5, SHA-2) over that digest fits the certificate that comes with it;
//! 3. that certificate is one of those that the operator trusts, or was issued by one of them, over at most [`MAX_CHAIN`] others that come
//!    with the signature.
//!
//! Without certificates to trust, 1 and 2 say that nobody has changed the image since *somebody* signed it; they do not say who. As in
//! UEFI, no dates are looked at: a kernel that was signed stays signed. Nothing is asked of a network, so nothing is known of certificates
//! that were taken back (`dbx`, CRLs).

use cms::cert::CertificateChoices;
use cms::content_info::ContentInfo;
use cms::signed_data::{SignedData, SignerIdentifier, SignerInfo};
use der::asn1::{Any, ObjectIdentifier, OctetString};
use der::{Decode, DecodePem, Encode, Sequence};
use object::LittleEndian;
use object::read::pe::PeFile64;
use rsa::pkcs8::DecodePublicKey;
use rsa::{Pkcs1v15Sign, RsaPublicKey};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::spki::AlgorithmIdentifierOwned;

/// Certificates between the signer's and a trusted one.
pub const MAX_CHAIN: usize = 4;

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// None there.
    #[error("the image carries no signature")]
    None,
    /// Not what it should be.
    #[error("the image's signature cannot be read: {0}")]
    Unreadable(String),
    /// Another image was signed.
    #[error("the image is not what was signed: its {algorithm} digest is {found}, the signature is for {signed}")]
    OtherImage {
        /// Of the digest.
        algorithm: &'static str,
        /// What the image has.
        found: String,
        /// What the signature has.
        signed: String,
    },
    /// The numbers do not fit.
    #[error("the signature does not fit the certificate of {signer}")]
    Forged {
        /// Whose it claims to be.
        signer: String,
    },
    /// Nobody who counts.
    #[error("the image is signed by {signer}, whom none of the {trusted} trusted certificates vouches for")]
    Untrusted {
        /// Who signed.
        signer: String,
        /// How many certificates are trusted.
        trusted: usize,
    },
}

/// A certificate that an operator trusts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trusted(Certificate);

impl Trusted {
    /// Reads one certificate, DER or PEM.
    ///
    /// # Errors
    /// Why it is none, or not one that can be used.
    pub fn parse(bytes: &[u8]) -> Result<Trusted, SignatureError> {
        let certificate = match bytes.starts_with(b"-----BEGIN") {
            true => Certificate::from_pem(bytes),
            false => Certificate::from_der(bytes),
        };
        let certificate = certificate.map_err(unreadable)?;
        key(&certificate)?;
        Ok(Trusted(certificate))
    }
}

/// A signature that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The subject of the signer's certificate.
    pub signer: String,
    /// Whether a trusted certificate vouches for it; otherwise anybody may have signed.
    pub trusted: bool,
}

/// `SpcIndirectDataContent`: what is signed in Authenticode.
#[derive(Sequence)]
struct IndirectData {
    _kind: Any,
    digest: DigestInfo,
}

#[derive(Sequence)]
struct DigestInfo {
    algorithm: AlgorithmIdentifierOwned,
    digest: OctetString,
}

const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const INDIRECT_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.311.2.1.4");
const MESSAGE_DIGEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.4");

/// A member of SHA-2.
struct Hash {
    name: &'static str,
    oid: ObjectIdentifier,
    /// With RSA, in a certificate.
    with_rsa: ObjectIdentifier,
    /// `DigestInfo` of PKCS #1, up to the digest itself (RFC 8017, 9.2, note 1).
    prefix: &'static [u8],
    of: fn(&[&[u8]]) -> Vec<u8>,
}

fn digest<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
    let mut digest = D::new();
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize().to_vec()
}

const HASHES: [Hash; 3] = [
    Hash {
        name: "SHA-256",
        oid: ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1"),
        with_rsa: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11"),
        prefix: b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20",
        of: digest::<Sha256>,
    },
    Hash {
        name: "SHA-384",
        oid: ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2"),
        with_rsa: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12"),
        prefix: b"\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30",
        of: digest::<Sha384>,
    },
    Hash {
        name: "SHA-512",
        oid: ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.3"),
        with_rsa: ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13"),
        prefix: b"\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40",
        of: digest::<Sha512>,
    },
];

impl Hash {
    fn by(oid: ObjectIdentifier) -> Result<&'static Hash, SignatureError> {
        let known = HASHES.iter().find(|hash| hash.oid == oid || hash.with_rsa == oid);
        known.ok_or_else(|| {
            SignatureError::Unreadable(format!("algorithm {oid} is none of SHA-256, SHA-384, SHA-512 with RSA"))
        })
    }

    /// Whether `signature` over `signed` was made with the key of `certificate`.
    fn fits(&self, certificate: &Certificate, signed: &[u8], signature: &[u8]) -> bool {
        let digest = (self.of)(&[signed]);
        let scheme = Pkcs1v15Sign { hash_len: Some(digest.len()), prefix: self.prefix.into() };
        key(certificate).is_ok_and(|key| key.verify(scheme, &digest, signature).is_ok())
    }
}

/// Verifies the image's signature. With certificates to trust, one of them must vouch for it.
///
/// # Errors
/// Why it does not count.
pub fn verify(file: &[u8], trusted: &[Trusted]) -> Result<Verified, SignatureError> {
    let image = Parts::of(file)?;
    let signature = ContentInfo::from_der(image.signature()?).map_err(unreadable)?;
    if signature.content_type != SIGNED_DATA {
        return Err(SignatureError::Unreadable(format!("content {} is not signed data", signature.content_type)));
    }
    let data: SignedData = signature.content.decode_as().map_err(unreadable)?;
    let [signer] = data.signer_infos.0.as_slice() else {
        return Err(SignatureError::Unreadable(format!("{} signers instead of one", data.signer_infos.0.len())));
    };

    let content =
        data.encap_content_info.econtent.as_ref().filter(|_| data.encap_content_info.econtent_type == INDIRECT_DATA);
    let content =
        content.ok_or_else(|| SignatureError::Unreadable("it is not for an image (Authenticode)".to_owned()))?;
    let indirect: IndirectData = content.decode_as().map_err(unreadable)?;
    let hash = Hash::by(indirect.digest.algorithm.oid)?;
    let (found, signed) = ((hash.of)(&image.covered), indirect.digest.digest.as_bytes());
    if found != signed {
        return Err(SignatureError::OtherImage { algorithm: hash.name, found: hex(&found), signed: hex(signed) });
    }

    let others: Vec<&Certificate> = data
        .certificates
        .iter()
        .flat_map(|set| set.0.iter())
        .filter_map(|choice| match choice {
            CertificateChoices::Certificate(certificate) => Some(certificate),
            CertificateChoices::Other(_) => None,
        })
        .collect();
    let own = others.iter().find(|certificate| is_of(certificate, signer));
    let own = own.ok_or_else(|| SignatureError::Unreadable("the signer's certificate is missing".to_owned()))?;
    let name = own.tbs_certificate.subject.to_string();
    if !fits(signer, own, content.value())? {
        return Err(SignatureError::Forged { signer: name });
    }
    let vouched = vouched_for(own, &others, trusted);
    if !vouched && !trusted.is_empty() {
        return Err(SignatureError::Untrusted { signer: name, trusted: trusted.len() });
    }
    Ok(Verified { signer: name, trusted: vouched })
}

/// The parts of a PE file that Authenticode covers, and its certificate table.
struct Parts<'a> {
    covered: [&'a [u8]; 3],
    table: &'a [u8],
}

impl<'a> Parts<'a> {
    /// The specification hashes headers and sections one by one. Here the file is hashed as it lies there, which is the same where
    /// sections follow each other without a gap, as in every kernel; a file with gaps is refused as not what was signed, and no byte
    /// of a file escapes.
    fn of(file: &'a [u8]) -> Result<Parts<'a>, SignatureError> {
        /// Of the optional header (PE32+): the checksum, and the table's entry among the data directories.
        const CHECKSUM: usize = 64;
        const SECURITY_ENTRY: usize = 112 + 8 * object::pe::IMAGE_DIRECTORY_ENTRY_SECURITY;
        const PE_HEADER: usize = 24;
        let pe = PeFile64::parse(file).map_err(|_| SignatureError::None)?;
        let entry =
            pe.data_directories().get(object::pe::IMAGE_DIRECTORY_ENTRY_SECURITY).ok_or(SignatureError::None)?;
        // Unlike in all other directories, this "address" is a file offset.
        let at = entry.virtual_address.get(LittleEndian) as usize;
        let size = entry.size.get(LittleEndian) as usize;
        if at == 0 || size == 0 {
            return Err(SignatureError::None);
        }
        let outside =
            || SignatureError::Unreadable(format!("its table of {size} bytes at {at:#x} is not the end of the file"));
        let table = file.get(at..).filter(|table| table.len() == size).ok_or_else(outside)?;
        let optional = pe.dos_header().nt_headers_offset() as usize + PE_HEADER;
        let (checksum, security) = (optional + CHECKSUM, optional + SECURITY_ENTRY);
        let part = |range: std::ops::Range<usize>| file.get(range).ok_or_else(outside);
        Ok(Parts { covered: [part(0..checksum)?, part(checksum + 4..security)?, part(security + 8..at)?], table })
    }

    /// The first entry of the table (`WIN_CERTIFICATE`): PKCS #7. Others, by other signers, are passed over.
    fn signature(&self) -> Result<&'a [u8], SignatureError> {
        const HEADER: usize = 8;
        const REVISION_2_PKCS: [u8; 4] = [0, 2, 2, 0];
        let bad = || SignatureError::Unreadable("its table has no PKCS #7 signature".to_owned());
        let (length, kind) = self.table.first_chunk::<HEADER>().ok_or_else(bad)?.split_at(4);
        if kind != REVISION_2_PKCS {
            return Err(bad());
        }
        let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
        let content = self.table.get(HEADER..length).ok_or_else(bad)?;
        // The length may count the padding to 8 bytes, and DER says itself where it ends.
        let mut reader = der::SliceReader::new(content).map_err(unreadable)?;
        der::Reader::tlv_bytes(&mut reader).map_err(unreadable)
    }
}

fn is_of(certificate: &Certificate, signer: &SignerInfo) -> bool {
    match &signer.sid {
        SignerIdentifier::IssuerAndSerialNumber(id) => {
            certificate.tbs_certificate.issuer == id.issuer
                && certificate.tbs_certificate.serial_number == id.serial_number
        }
        SignerIdentifier::SubjectKeyIdentifier(_) => false,
    }
}

/// Whether the signer's signature fits his certificate and the signed content.
fn fits(signer: &SignerInfo, certificate: &Certificate, content: &[u8]) -> Result<bool, SignatureError> {
    let hash = Hash::by(signer.digest_alg.oid)?;
    let signature = signer.signature.as_bytes();
    let Some(attributes) = &signer.signed_attrs else {
        return Ok(hash.fits(certificate, content, signature));
    };
    // What is signed are the attributes, and one of them is the content's digest.
    let stated = attributes
        .iter()
        .find(|attribute| attribute.oid == MESSAGE_DIGEST)
        .and_then(|attribute| attribute.values.get(0));
    let stated = stated.and_then(|value| value.decode_as::<OctetString>().ok());
    let same = stated.is_some_and(|digest| digest.as_bytes() == (hash.of)(&[content]));
    Ok(same && hash.fits(certificate, &attributes.to_der().map_err(unreadable)?, signature))
}

/// Whether a trusted certificate is this one, or has issued it, or one of `others` that did.
fn vouched_for(certificate: &Certificate, others: &[&Certificate], trusted: &[Trusted]) -> bool {
    let mut current = certificate;
    for _ in 0..=MAX_CHAIN {
        if trusted.iter().any(|Trusted(anchor)| anchor == current || issued(anchor, current)) {
            return true;
        }
        match others.iter().find(|other| **other != current && may_issue(other) && issued(other, current)) {
            Some(issuer) => current = issuer,
            None => return false,
        }
    }
    false
}

/// Whether `issuer` signed `certificate`.
fn issued(issuer: &Certificate, certificate: &Certificate) -> bool {
    let Ok(hash) = Hash::by(certificate.signature_algorithm.oid) else { return false };
    let (Ok(signed), Some(signature)) = (certificate.tbs_certificate.to_der(), certificate.signature.as_bytes()) else {
        return false;
    };
    issuer.tbs_certificate.subject == certificate.tbs_certificate.issuer && hash.fits(issuer, &signed, signature)
}

/// Whether a certificate that nobody named may stand between others: basicConstraints says that it is an authority's.
fn may_issue(certificate: &Certificate) -> bool {
    let constraints = certificate.tbs_certificate.get::<x509_cert::ext::pkix::BasicConstraints>();
    matches!(constraints, Ok(Some((_, constraints))) if constraints.ca)
}

fn key(certificate: &Certificate) -> Result<RsaPublicKey, SignatureError> {
    let info = certificate.tbs_certificate.subject_public_key_info.to_der().map_err(unreadable)?;
    RsaPublicKey::from_public_key_der(&info)
        .map_err(|error| SignatureError::Unreadable(format!("a certificate has no RSA key of a usual size: {error}")))
}

fn unreadable(error: der::Error) -> SignatureError {
    SignatureError::Unreadable(error.to_string())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by openssl: an authority, who issued "signer"; and "stranger", who says of himself that the same authority did.
    const AUTHORITY: &[u8] = include_bytes!("../../tests/data/authority.pem");
    const SIGNER: &[u8] = include_bytes!("../../tests/data/signer.der");
    const STRANGER: &[u8] = include_bytes!("../../tests/data/stranger.der");

    #[test]
    fn who_was_issued_by_whom() {
        let [authority, signer, stranger] = [AUTHORITY, SIGNER, STRANGER].map(|bytes| Trusted::parse(bytes).unwrap());
        let vouched =
            |who: &Trusted, others: &[&Certificate], trusted: &[Trusted]| vouched_for(&who.0, others, trusted);
        assert!(vouched(&signer, &[], std::slice::from_ref(&authority)));
        assert!(vouched(&signer, &[], std::slice::from_ref(&signer)));
        assert!(!vouched(&stranger, &[&authority.0], std::slice::from_ref(&authority)), "only its name is right");
        assert!(!vouched(&signer, &[&authority.0], std::slice::from_ref(&stranger)));
        assert!(!vouched(&signer, &[&authority.0], &[]));
        // An authority that issued itself does not make an endless chain.
        assert!(!vouched(&authority, &[&authority.0, &signer.0], std::slice::from_ref(&stranger)));
        assert!(may_issue(&authority.0) && !may_issue(&signer.0));
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        for bytes in
            [b"".as_slice(), b"-----BEGIN CERTIFICATE-----\n", b"\x30\x03\x02\x01\x00", &SIGNER[..SIGNER.len() - 1]]
        {
            assert!(Trusted::parse(bytes).is_err());
        }
    }
}
