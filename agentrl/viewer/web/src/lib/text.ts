/** Text as it is, with what would deceive the eye made visible: controls, escapes, direction overrides, lone surrogates. */
export interface Part {
  text: string
  /** A mark stands for a character that cannot be seen; `text` is its name. */
  mark: boolean
}

// ESC and NUL, C0 and C1 controls but tab and newline, direction controls, zero-width characters, tags, unpaired surrogates.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\udb40[\udc00-\udc7f]/g

const NAMES: Record<number, string> = {
  0x1b: 'ESC', 0x00: 'NUL', 0x0d: 'CR', 0x07: 'BEL', 0x08: 'BS', 0x0c: 'FF', 0x7f: 'DEL', 0x200b: 'ZWSP', 0x200c: 'ZWNJ', 0x200d: 'ZWJ',
  0x200e: 'LRM', 0x200f: 'RLM', 0x202a: 'LRE', 0x202b: 'RLE', 0x202c: 'PDF', 0x202d: 'LRO', 0x202e: 'RLO', 0x2066: 'LRI', 0x2067: 'RLI',
  0x2068: 'FSI', 0x2069: 'PDI', 0xfeff: 'BOM', 0x061c: 'ALM',
}

export function name(character: string): string {
  const code = character.codePointAt(0)!
  return NAMES[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, '0')}`
}

export function parts(text: string): Part[] {
  const out: Part[] = []
  let from = 0
  for (const found of text.matchAll(HIDDEN)) {
    // A joiner between emoji is how families are written; a carriage return before a newline is how Windows writes lines.
    if (found[0] === '\u200d' && /\p{Extended_Pictographic}|\ufe0f/u.test(text.slice(Math.max(0, found.index - 2), found.index))) continue
    if (found[0] === '\r' && text[found.index + 1] === '\n') continue
    if (found.index > from) out.push({ text: text.slice(from, found.index), mark: false })
    out.push({ text: name(found[0]), mark: true })
    from = found.index + found[0].length
  }
  if (from < text.length) out.push({ text: text.slice(from), mark: false })
  return out
}

/** The same as one string: hidden characters by name, in angle quotes. For names and titles. */
export function plain(text: string): string {
  return parts(text)
    .map((part) => (part.mark ? `‹${part.text}›` : part.text))
    .join('')
}

/** The first `size` characters, cut at a line end where one is near and never inside a surrogate pair. */
export function cut(text: string, size: number): string {
  if (text.length <= size) return text
  const line = text.lastIndexOf('\n', size)
  let at = line > size * 0.8 ? line + 1 : size
  const code = text.charCodeAt(at - 1)
  if (code >= 0xd800 && code <= 0xdbff) at--
  return text.slice(0, at)
}

/** A token's text in one line: newlines and tabs shown by a sign. */
export function visible(piece: string): string {
  return plain(piece)
    .replaceAll('\n', '⏎')
    .replaceAll('\t', '⇥')
}
