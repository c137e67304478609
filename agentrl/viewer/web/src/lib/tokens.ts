/** The token view's data: one binary answer, decoded without copies, cut into chunks that can be drawn alone. */
export interface Block {
  turn: number
  where: 'context' | 'output'
  role: string
  origin: string
  actor: string
  start: number
  stop: number
}

export interface Tokens {
  n: number
  blocks: Block[]
  ids: Int32Array
  arrays: Record<string, Float32Array | Int32Array | Uint8Array>
  pieces: Map<number, string>
  exactEntropy: boolean
}

const TYPES = { i4: Int32Array, f4: Float32Array, u1: Uint8Array } as const

/** Raises where the answer is cut short: a wrong picture would be worse than none. */
export function decode(buffer: ArrayBuffer): Tokens {
  if (buffer.byteLength < 4) throw new Error('the token data is empty')
  const length = new DataView(buffer).getUint32(0, true)
  if (4 + length > buffer.byteLength) throw new Error('the token data is cut short')
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
  const base = header.base ?? 4 + length
  const arrays: Tokens['arrays'] = {}
  for (const { name, dtype, offset, length: count } of header.arrays) {
    const type = TYPES[dtype as keyof typeof TYPES]
    const at = base + offset
    const size = count * type.BYTES_PER_ELEMENT
    if (at + size > buffer.byteLength) throw new Error(`the token data is cut short in ${name}`)
    // A typed array wants an aligned start; a header of odd length costs one copy.
    arrays[name] = at % type.BYTES_PER_ELEMENT === 0 ? new type(buffer, at, count) : new type(buffer.slice(at, at + size))
  }
  const pieces = new Map<number, string>()
  for (const [id, piece] of Object.entries(header.pieces)) pieces.set(Number(id), piece as string)
  const ids = arrays.ids as Int32Array
  return { n: header.n, blocks: header.blocks, ids, arrays, pieces, exactEntropy: Boolean(header.exact_entropy) }
}

/** A run of one block's tokens that is drawn, measured and dropped as one. */
export interface Chunk {
  block: number
  start: number
  stop: number
  /** The first of its block: it shows the block's heading. */
  head: boolean
}

/** Cut blocks into chunks of about `size` tokens, at line ends where one is near. */
export function chunked(blocks: Block[], piece: (i: number) => string, size = 320): Chunk[] {
  const out: Chunk[] = []
  blocks.forEach((block, number) => {
    let start = block.start
    do {
      let stop = Math.min(block.stop, start + size)
      if (stop < block.stop) {
        for (let i = stop; i > start + size / 2; i--) {
          if (piece(i - 1).includes('\n')) {
            stop = i
            break
          }
        }
      }
      out.push({ block: number, start, stop, head: start === block.start })
      start = stop
    } while (start < block.stop)
  })
  return out
}

/** About how many lines a chunk takes at `columns` characters a line. */
export function lines(piece: (i: number) => string, start: number, stop: number, columns: number): number {
  let count = 1
  let column = 0
  for (let i = start; i < stop; i++) {
    const text = piece(i)
    let from = 0
    let at = text.indexOf('\n')
    while (at >= 0) {
      column += at - from + 1
      count += Math.floor(Math.max(0, column - 1) / columns) + 1
      column = 0
      from = at + 1
      at = text.indexOf('\n', from)
    }
    column += text.length - from
  }
  return count + Math.floor(Math.max(0, column - 1) / columns)
}

/** Where the n-th sampled token of a turn stands in the row view, −1 where there is none. */
export function position(tokens: Tokens, turn: number, token: number): number {
  let left = token
  for (const block of tokens.blocks) {
    if (block.turn !== turn || block.where !== 'output' || block.origin !== 'sampled') continue
    const size = block.stop - block.start
    if (left < size) return block.start + left
    left -= size
  }
  return -1
}

/** The inverse: the turn and the number among that turn's sampled tokens, or null for a token that no policy sampled. */
export function place(tokens: Tokens, i: number): { turn: number; token: number } | null {
  const at = tokens.blocks.findIndex((block) => i >= block.start && i < block.stop)
  const block = tokens.blocks[at]
  if (!block || block.where !== 'output' || block.origin !== 'sampled') return null
  let token = i - block.start
  for (let b = 0; b < at; b++) {
    const before = tokens.blocks[b]
    if (before.turn === block.turn && before.where === 'output' && before.origin === 'sampled') token += before.stop - before.start
  }
  return { turn: block.turn, token }
}
