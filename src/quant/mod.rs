//! Weight formats: what the bytes of a quantized matrix mean, how to make them and how to read them back.
