"""Data sets that are built offline from packages: GlyphDomains, DigitsDomains, EmojiDomains."""
