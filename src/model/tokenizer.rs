//! Text to token ids and back, from a Hugging Face `tokenizer.json` or from the arrays of a GGUF file.
//!
//! The merging itself is the `tokenizers` crate's. This room holds what differs between the two files, the checks
//! that a hostile vocabulary needs, and decoding that is exact to the byte.
//!
//! A GGUF file names its pre-tokenizer instead of spelling it out; [`PRE_TOKENIZERS`] spells out the ones known here
//! as llama.cpp does, since that is what wrote and reads these files. Qwen's `tokenizer.json` also normalises to NFC;
//! GGUF has no word for it and llama.cpp does not do it, so neither does [`Tokenizer::from_gguf`].

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::tokenizer::AddedVocabulary;
use tokenizers::{
    AddedToken, DecoderWrapper, Model, OffsetType, PostProcessor, PreTokenizer, PreTokenizerWrapper,
    SplitDelimiterBehavior, TruncationDirection,
};

/// What can go wrong with a vocabulary, a text or an id.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no usable `tokenizer.json`.
    #[error("{} is not a usable tokenizer.json: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A kind of tokenizer that GGUF can name and this runtime does not have.
    #[error(
        "tokenizer.ggml.model is '{0}', which is not supported; known: gpt2 (byte-level BPE). \
         Use the model's Hugging Face directory, whose tokenizer.json needs no such name"
    )]
    Model(String),
    /// A pre-tokenizer that is not in [`PRE_TOKENIZERS`].
    #[error(
        "tokenizer.ggml.pre is '{0}', which is not supported; known: {known}. \
         Use the model's Hugging Face directory, whose tokenizer.json spells it out",
        known = PRE_TOKENIZERS.iter().flat_map(|p| p.names).copied().collect::<Vec<_>>().join(", ")
    )]
    PreTokenizer(String),
    /// Arrays of the GGUF vocabulary that contradict each other.
    #[error("the GGUF vocabulary is broken: {0}")]
    Vocabulary(String),
    /// The `tokenizers` crate refused the text.
    #[error("cannot encode the text: {0}")]
    Encode(String),
    /// The `tokenizers` crate refused the ids.
    #[error("cannot decode the ids: {0}")]
    Decode(String),
    /// An id that no token has.
    #[error("token id {id} is not in the vocabulary of {size} ids")]
    UnknownId {
        /// The id.
        id: u32,
        /// One past the largest id.
        size: usize,
    },
    /// A sentence limit with no room for text.
    #[error("a sentence of at most {max} tokens has no room for text beside its {added} special tokens")]
    NoRoom {
        /// The limit asked for.
        max: usize,
        /// The special tokens that the post-processor adds.
        added: usize,
    },
}

/// One pre-tokenizer of [`PRE_TOKENIZERS`].
pub struct PreTokenizerSpec {
    /// The values of `tokenizer.ggml.pre` that mean it.
    pub names: &'static [&'static str],
    /// Applied in turn, each to the pieces of the one before; what lies between two matches is a piece too.
    pub splits: &'static [&'static str],
    /// A piece that is itself a token is that token, whatever the merges say.
    pub ignore_merges: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// The pre-tokenizers of GGUF files known here, as llama.cpp defines them.
pub const PRE_TOKENIZERS: &[PreTokenizerSpec] = &[
    PreTokenizerSpec { names: &["smollm"], splits: &[r"\p{N}", GPT2], ignore_merges: false },
    PreTokenizerSpec {
        names: &["llama-bpe", "llama3", "llama-v3"],
        splits: &[concat!(
            r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: true,
    },
    PreTokenizerSpec {
        names: &["qwen2"],
        splits: &[concat!(
            r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ignore_merges: false,
    },
    PreTokenizerSpec { names: &["gpt-2"], splits: &[GPT2], ignore_merges: false },
    PreTokenizerSpec {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
    },
];

/// The tokenizer keys of a GGUF file, as plain data.
#[derive(Debug, Clone, Default)]
pub struct GgufVocab<'a> {
    /// `tokenizer.ggml.model`; only `gpt2` is supported.
    pub model: &'a str,
    /// `tokenizer.ggml.pre`; `default` where the file has none.
    pub pre: &'a str,
    /// `tokenizer.ggml.tokens`: the id is the index.
    pub tokens: Vec<&'a str>,
    /// `tokenizer.ggml.token_type`, one per token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    /// Empty where the file has none: all normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: "left right", best first.
    pub merges: Vec<&'a str>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: the end of a turn, where it is another token than the end of the text.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; false where the file has none.
    pub add_bos: bool,
}

/// Text to ids and back. Cheap to share between threads, not to clone.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens with the special ones switched off: what [`Tokenizer::encode_plain`] recognises.
    plain: AddedVocabulary,
    /// Tokens spell bytes (GPT-2's alphabet), so decoding is a table, exact to the byte.
    byte_level: bool,
    size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`; its truncation and padding are switched off.
    ///
    /// BOS is what its post-processor puts first, if anything (`[CLS]` for BERT). EOS is in other files: see
    /// [`Tokenizer::set_ends`].
    pub fn from_json_file(path: &Path) -> Result<Tokenizer, Error> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let broken = |reason: String| Error::Json { path: path.into(), reason: short(&reason) };
        // The parser indexes by what the file claims (a merge longer than every token, a template without its token),
        // so a hostile file can make it panic: caught here, with a first encoding, and told as an error.
        catch_unwind(AssertUnwindSafe(|| Tokenizer::from_json(&bytes)))
            .unwrap_or_else(|_| Err("its parts contradict each other".into()))
            .map_err(broken)
    }

    fn from_json(bytes: &[u8]) -> Result<Tokenizer, String> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        let largest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        let (token, id) = largest.ok_or("its vocabulary is empty")?;
        if id >= 1 << 24 {
            let token = short(&token);
            return Err(format!("token '{token}' has id {id}; no vocabulary reaches {}", 1 << 24));
        }
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let mut tokenizer = Tokenizer::new(inner, byte_level, id as usize + 1);
        tokenizer.encode("a b").map_err(|e| e.to_string())?;
        let framed = tokenizer.encode_sentence("", usize::MAX).map_err(|e| e.to_string())?;
        tokenizer.bos = framed.first().copied();
        tokenizer.add_bos = tokenizer.bos.is_some();
        Ok(tokenizer)
    }

    /// Builds the byte-level BPE tokenizer that a GGUF file describes. Every array is checked against the others;
    /// errors name the token, merge or id.
    pub fn from_gguf(v: GgufVocab) -> Result<Tokenizer, Error> {
        if v.model != "gpt2" {
            return Err(Error::Model(short(v.model)));
        }
        let pre = PRE_TOKENIZERS
            .iter()
            .find(|p| p.names.contains(&v.pre))
            .ok_or_else(|| Error::PreTokenizer(short(v.pre)))?;
        let (vocab, merges) = check_gguf(&v)?;

        let broken = |e: tokenizers::Error| Error::Vocabulary(e.to_string());
        let mut bpe = BPE::new(vocab.into_iter().collect(), merges); // what it would panic on is checked above
        bpe.ignore_merges = pre.ignore_merges;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for &regex in pre.splits {
            let pattern = SplitPattern::Regex(regex.into());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(broken)?.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        inner.with_pre_tokenizer(Some(Sequence::new(steps)));
        // Control and unknown tokens are special; user-defined ones are found in any text but print as text.
        let added = v.tokens.iter().zip(&v.token_types).filter(|(_, t)| matches!(t, 2..=4));
        inner
            .add_tokens(added.map(|(token, &t)| AddedToken::from(*token, t != 4).normalized(false)))
            .map_err(broken)?;

        let mut tokenizer = Tokenizer::new(inner, true, v.tokens.len());
        (tokenizer.bos, tokenizer.eos, tokenizer.eot, tokenizer.add_bos) = (v.bos, v.eos, v.eot, v.add_bos);
        Ok(tokenizer)
    }

    fn new(inner: tokenizers::Tokenizer, byte_level: bool, size: usize) -> Tokenizer {
        let mut plain = inner.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        Tokenizer { inner, plain, byte_level, size, bos: None, eos: None, eot: None, add_bos: false }
    }

    /// The ids of `text`. Special tokens written in the text, such as `<|im_start|>`, are recognised; no BOS is added.
    ///
    /// A byte that the vocabulary has no token for is dropped, as everywhere (SmolLM2 lacks 21, such as U+0004). After
    /// a blank run of a million characters the rest of the text is merged as one piece: the regex engine's limit.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| Error::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of text that nobody vouches for: special tokens written in it stay text, so it cannot end a turn or
    /// open another. Added tokens that are not special are still recognised.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encode = || -> tokenizers::Result<Vec<u32>> {
            let mut pieces = self.plain.extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(pre) = self.inner.get_pre_tokenizer() {
                pre.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| self.inner.get_model().tokenize(piece.get()))?;
            Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        };
        encode().map_err(|e| Error::Encode(e.to_string()))
    }

    /// The ids of `text` framed by the tokenizer's post-processor (`[CLS]` … `[SEP]` for BERT), at most `max` of them:
    /// the text is cut at its end, the frame stays whole. An error if `max` leaves no room for text.
    pub fn encode_sentence(&self, text: &str, max: usize) -> Result<Vec<u32>, Error> {
        let added = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(false));
        if max <= added {
            return Err(Error::NoRoom { max, added });
        }
        let mut encoding = self.inner.encode_fast(text, false).map_err(|e| Error::Encode(e.to_string()))?;
        encoding.truncate(max - added, 0, TruncationDirection::Right);
        let framed = self.inner.post_process(encoding, None, true).map_err(|e| Error::Encode(e.to_string()))?;
        Ok(framed.get_ids().to_vec())
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD. An id that no token has is an error.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        if self.byte_level {
            let mut bytes = Vec::new();
            for &id in ids {
                self.push_bytes(id, skip_special, &mut bytes)?;
            }
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        if let Some(&id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(Error::UnknownId { id, size: self.size });
        }
        self.inner.decode(ids, skip_special).map_err(|e| Error::Decode(e.to_string()))
    }

    /// A decoder for ids that arrive one at a time.
    pub fn decoder(&self, skip_special: bool) -> Decoder<'_> {
        Decoder { tokenizer: self, skip_special, bytes: Vec::new(), ids: Vec::new(), shown: 0 }
    }

    /// The tokenizer as the text of a `tokenizer.json`, from which [`Tokenizer::from_json_file`] makes the same ids.
    pub fn to_json(&self) -> Result<String, Error> {
        let broken = |e: tokenizers::Error| Error::Vocabulary(e.to_string());
        let mut whole = self.inner.clone();
        if self.byte_level {
            whole.with_decoder(Some(ByteLevel::default()));
        }
        if let Some((id, token)) = self.bos.filter(|_| self.add_bos).and_then(|id| Some((id, self.token(id)?))) {
            let template = TemplateProcessing::builder()
                .try_single(vec![token.clone(), "$A".into()])
                .and_then(|b| b.special_tokens(vec![(token, id)]).build().map_err(|e| e.to_string()));
            whole.with_post_processor(Some(template.map_err(Error::Vocabulary)?));
        }
        whole.to_string(true).map_err(broken)
    }

    /// One past the largest id.
    pub fn vocab_size(&self) -> usize {
        self.size
    }

    /// The token of `id` as the vocabulary spells it: byte-level tokens in GPT-2's alphabet (`Ġ` for a space).
    pub fn token(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id);
        added.map(|t| t.content.clone()).or_else(|| self.inner.get_model().id_to_token(id))
    }

    /// The bytes that a token stands for, special ones as they are written. An id that no token has is an error.
    pub fn bytes(&self, id: u32) -> Result<Vec<u8>, Error> {
        if !self.byte_level {
            return Ok(self.decode(&[id], false)?.into_bytes());
        }
        let mut bytes = Vec::new();
        self.push_bytes(id, false, &mut bytes)?;
        Ok(bytes)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a special token: one that steers the model and is no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// The token that begins a text, if the vocabulary has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that ends a turn, where it is not EOS.
    pub fn eot(&self) -> Option<u32> {
        self.eot
    }

    /// Whether the model's metadata asks for BOS before a prompt.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Sets what `tokenizer.json` does not say and the files beside it do. An error if an id is no token's.
    pub fn set_ends(
        &mut self,
        bos: Option<u32>,
        eos: Option<u32>,
        eot: Option<u32>,
        add_bos: bool,
    ) -> Result<(), Error> {
        for id in [bos, eos, eot].into_iter().flatten() {
            if self.token(id).is_none() {
                return Err(Error::UnknownId { id, size: self.size });
            }
        }
        (self.bos, self.eos, self.eot, self.add_bos) = (bos, eos, eot, add_bos);
        Ok(())
    }

    /// Appends the bytes of a byte-level token. Added tokens, and any with a character outside the alphabet, are
    /// plain text.
    fn push_bytes(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) -> Result<(), Error> {
        if let Some(added) = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            if !(skip_special && added.special) {
                out.extend_from_slice(added.content.as_bytes());
            }
            return Ok(());
        }
        let token = self.inner.get_model().id_to_token(id).ok_or(Error::UnknownId { id, size: self.size })?;
        let start = out.len();
        for c in token.chars() {
            match byte_of(c) {
                Some(b) => out.push(b),
                None => {
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Decodes a stream of ids without ever printing half a character: bytes wait until their character is whole.
/// The pieces and the finish, joined, are the text that [`Tokenizer::decode`] gives for all the ids.
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    bytes: Vec<u8>, // byte-level: the start of a character
    ids: Vec<u32>,  // otherwise: the ids last shown, as context, then those that wait
    shown: usize,   // how many of `ids` are shown
}

impl Decoder<'_> {
    /// Takes the next id; gives the text that it completes, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, Error> {
        let text = if self.tokenizer.byte_level {
            self.tokenizer.push_bytes(id, self.skip_special, &mut self.bytes)?;
            take_chars(&mut self.bytes)
        } else {
            self.ids.push(id);
            match self.waiting() {
                // Half a character, or a skipped token: wait, with what is shown kept as context.
                Ok(text) if text.is_empty() || text.ends_with('\u{fffd}') => String::new(),
                Ok(text) => {
                    self.ids.drain(..self.shown);
                    self.shown = self.ids.len();
                    text
                }
                Err(e) => {
                    self.ids.pop();
                    return Err(e);
                }
            }
        };
        Ok((!text.is_empty()).then_some(text))
    }

    /// What still waits at the end of the stream, an unfinished character as U+FFFD.
    pub fn finish(self) -> String {
        if self.tokenizer.byte_level {
            return String::from_utf8_lossy(&self.bytes).into_owned();
        }
        self.waiting().unwrap_or_default() // each id was decoded when it was pushed
    }

    /// The text of the ids not shown yet: decoded after those shown, for a decoder may treat the first id specially.
    fn waiting(&self) -> Result<String, Error> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special)?;
        let after = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(after.get(before.len()..).unwrap_or_default().into())
    }
}

/// Takes the whole characters from the front of `bytes`, with U+FFFD for what can no longer become one.
fn take_chars(bytes: &mut Vec<u8>) -> String {
    let (mut text, mut done) = (String::new(), 0);
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(e) => {
                let valid = &bytes[done..done + e.valid_up_to()];
                text.push_str(&String::from_utf8_lossy(valid));
                done += e.valid_up_to();
                match e.error_len() {
                    Some(n) => {
                        text.push('\u{fffd}');
                        done += n;
                    }
                    None => {
                        bytes.drain(..done);
                        return text;
                    }
                }
            }
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 for itself, the 68 others from U+0100.
fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(c as u8),
        c @ 0x100..=0x120 => Some((c - 0x100) as u8),        // 00..=20
        c @ 0x121..=0x142 => Some((c - 0x121 + 0x7f) as u8), // 7f..=a0
        0x143 => Some(0xad),
        _ => None,
    }
}

type Vocab = HashMap<String, u32>;
type Merges = Vec<(String, String)>;

/// Text from a file, fit for one line of a message: at most 200 characters, control characters as U+FFFD.
pub(super) fn short(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The vocabulary and merges of a GGUF file, every array checked against the others.
fn check_gguf(v: &GgufVocab) -> Result<(Vocab, Merges), Error> {
    let broken = |what: String| Err(Error::Vocabulary(short(&what)));
    let count = v.tokens.len();
    if count == 0 || count > 1 << 24 {
        return broken(format!("tokenizer.ggml.tokens has {count} tokens"));
    }
    if !v.token_types.is_empty() && v.token_types.len() != count {
        let types = v.token_types.len();
        return broken(format!("tokenizer.ggml.token_type has {types} entries for {count} tokens"));
    }
    if let Some(id) = v.token_types.iter().position(|t| !(0..=6).contains(t)) {
        return broken(format!("token {id} '{}' has type {}; types are 0 to 6", v.tokens[id], v.token_types[id]));
    }
    let mut vocab = Vocab::with_capacity(count);
    for (id, &token) in v.tokens.iter().enumerate() {
        if let Some(first) = vocab.insert(token.into(), id as u32) {
            return broken(format!("tokens {first} and {id} are both '{token}'"));
        }
    }
    for (key, id) in [("bos", v.bos), ("eos", v.eos), ("eot", v.eot)] {
        if let Some(id) = id.filter(|&id| id as usize >= count) {
            return broken(format!("tokenizer.ggml.{key}_token_id is {id}; there are {count} tokens"));
        }
    }
    let mut merges = Merges::with_capacity(v.merges.len());
    for (rank, &merge) in v.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ') else {
            return broken(format!("merge {rank} '{merge}' is not two tokens with a space between"));
        };
        for token in [left, right, &format!("{left}{right}")] {
            if !vocab.contains_key(token) {
                return broken(format!("merge {rank} '{merge}' needs '{token}', which is not a token"));
            }
        }
        merges.push((left.into(), right.into()));
    }
    Ok((vocab, merges))
}
