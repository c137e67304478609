/** Tens of thousands of tokens, one span each, drawn only where they are looked at.
 *
 * Blocks are cut into chunks; a chunk is drawn, measured and dropped as one. What is drawn stands in normal flow inside
 * one window that is moved to its offset, so that a wrong guess of a height moves nothing that the reader looks at.
 */
import type { Metric } from '../lib/scale'
import { classes } from '../lib/scale'
import { chunked, lines, type Chunk, type Tokens } from '../lib/tokens'
import { visible } from '../lib/text'
import { Heights } from '../lib/virtual'

const LINE = 21
const PAD = 9
/** Pixels beyond the view: those that are drawn with it at once, and those that are drawn when its frame is out. */
const NEAR = 200
const FAR = 1200

export class TokenList {
  private chunks: Chunk[]
  private heights = new Heights([])
  private drawn = new Map<number, HTMLElement>()
  private q: Uint8Array
  private shown = new Map<number, string>()
  private window: HTMLElement
  private space: HTMLElement
  private width = 0
  private columns = 80
  private filling = false
  private chasing = false
  private seen = -1
  selected = -1

  constructor(
    private scroller: HTMLElement,
    private tokens: Tokens,
    private metric: Metric,
    private moved: () => void,
  ) {
    this.chunks = chunked(tokens.blocks, (i) => this.text(i))
    this.q = classes(metric, tokens.arrays[metric.name], tokens.n)
    this.space = document.createElement('div')
    this.space.className = 'tk-space'
    this.window = document.createElement('div')
    this.window.className = 'tk-window'
    this.space.append(this.window)
    scroller.replaceChildren(this.space)
    this.resize()
  }

  /** What a token shows: hidden characters by name, a newline as a sign and a break. */
  text(i: number): string {
    const id = this.tokens.ids[i]
    let text = this.shown.get(id)
    if (text === undefined) {
      const piece = this.tokens.pieces.get(id)
      text = piece === undefined ? `⟨${id}⟩` : piece === '' ? '∅' : visible(piece).replaceAll('⏎', '⏎\n')
      this.shown.set(id, text)
    }
    return text
  }

  resize(): void {
    const width = this.scroller.clientWidth
    if (width === this.width || width < 50) return
    // What stands at the top stays there: lines break anew, so offsets of before mean nothing.
    const anchor = this.heights.n ? this.heights.at(this.scroller.scrollTop) : 0
    this.width = width
    const probe = document.createElement('span')
    probe.className = 'tk-probe'
    probe.textContent = '0'.repeat(100)
    this.scroller.append(probe)
    const each = probe.getBoundingClientRect().width / 100 || 7.5
    probe.remove()
    this.columns = Math.max(20, Math.floor((width - 116 - 28) / each))
    const guesses = this.chunks.map((c) => lines((i) => this.text(i), c.start, c.stop, this.columns) * LINE + (c.head ? PAD : 0))
    this.heights = new Heights(guesses)
    this.clear()
    this.space.style.height = `${this.heights.total + 24}px`
    if (anchor) this.scroller.scrollTop = this.heights.top(anchor)
    this.draw()
    if (this.selected >= 0) this.reveal(this.selected)
  }

  private clear(): void {
    this.drawn.clear()
    this.window.replaceChildren()
  }

  /** Make the drawn chunks those that the reader sees.
   *
   * Only what is seen has to be there in this frame; what is around it follows chunk by chunk, so that the compositor
   * has something to show where it scrolls ahead of us. While the browser animates a scroll, a frame's offset is set
   * after its scroll event: so every frame is looked at again, until the offset stands still.
   */
  draw(): void {
    this.see()
    if (!this.chasing) {
      this.chasing = true
      this.chase(0)
    }
    if (!this.filling) {
      this.filling = true
      requestAnimationFrame(() => setTimeout(() => this.fill()))
    }
  }

  private see(): void {
    this.moved()
    // Chunks may turn out lower than was guessed: look again until the view is full.
    for (let look = 0; look < 4; look++) {
      const { scrollTop, clientHeight } = this.scroller
      const [first, last] = this.heights.window(scrollTop, clientHeight, NEAR)
      const [from, to] = this.range()
      this.seen = scrollTop
      if (from <= first && to >= last) return
      this.cover(first, last)
    }
  }

  private chase(still: number): void {
    requestAnimationFrame(() => {
      const moved = this.scroller.scrollTop !== this.seen
      this.chasing = this.space.isConnected && (moved || still < 10)
      if (!this.chasing) return
      if (moved) this.see()
      this.chase(moved ? 0 : still + 1)
    })
  }

  /** Draw the next chunk on either side, until the surroundings are there. */
  private fill(): void {
    this.filling = false
    if (!this.space.isConnected || !this.drawn.size) return
    const { scrollTop, clientHeight } = this.scroller
    const [first, last] = this.heights.window(scrollTop, clientHeight, FAR)
    const [from, to] = this.range()
    if (from <= first && to >= last) return
    this.cover(Math.max(first, from - 1), Math.min(last, to + 1))
    this.moved()
    this.filling = true
    setTimeout(() => this.fill())
  }

  /** What is drawn: chunks [first, last), without a gap. */
  private range(): [number, number] {
    return this.drawn.size ? [Math.min(...this.drawn.keys()), Math.max(...this.drawn.keys()) + 1] : [0, 0]
  }

  /** Have chunks [first, last) drawn, and what is drawn beside them and not far. */
  private cover(first: number, last: number): void {
    const { scrollTop, clientHeight } = this.scroller
    const keep = this.heights.window(scrollTop, clientHeight, FAR)
    const [from, to] = this.range()
    const apart = to < first || from > last
    for (const [i, node] of this.drawn) {
      if (apart || i < Math.min(first, keep[0]) || i >= Math.max(last, keep[1])) {
        node.remove()
        this.drawn.delete(i)
      }
    }
    if (this.drawn.size) {
      const [low, high] = this.range()
      first = Math.min(first, low)
      last = Math.max(last, high)
    }
    const fresh: number[] = []
    let before: ChildNode | null = this.window.firstChild
    for (let i = first; i < last; i++) {
      const have = this.drawn.get(i)
      if (have) {
        before = have.nextSibling
        continue
      }
      const node = this.make(i)
      this.window.insertBefore(node, before)
      this.drawn.set(i, node)
      fresh.push(i)
    }
    let above = 0
    const anchor = this.heights.at(scrollTop)
    for (const i of fresh) {
      const grown = this.heights.set(i, this.drawn.get(i)!.offsetHeight)
      if (i < anchor) above += grown
    }
    this.space.style.height = `${this.heights.total + 24}px`
    this.window.style.transform = `translateY(${this.heights.top(first)}px)`
    if (above) this.scroller.scrollTop = scrollTop + above
  }

  private make(number: number): HTMLElement {
    const chunk = this.chunks[number]
    const block = this.tokens.blocks[chunk.block]
    const node = document.createElement('div')
    node.className = `tk-chunk ${block.origin === 'sampled' ? 'sampled' : block.role} ${block.origin === 'template' ? 'template' : ''}${chunk.head ? ' head' : ''}`
    const gutter = document.createElement('div')
    gutter.className = 'tk-gutter'
    if (chunk.head) {
      const turn = document.createElement('span')
      turn.className = 'tk-turn'
      const before = this.tokens.blocks[chunk.block - 1]
      turn.textContent = before && before.turn === block.turn ? '' : String(block.turn + 1)
      gutter.append(turn, block.origin === block.role || block.origin === 'template' ? block.role : block.origin)
    }
    const flow = document.createElement('div')
    flow.className = 'tk-flow'
    flow.dir = 'ltr'
    for (let i = chunk.start; i < chunk.stop; i++) {
      const token = document.createElement('span')
      token.className = this.name(i)
      token.textContent = this.text(i)
      flow.append(token)
    }
    node.append(gutter, flow)
    return node
  }

  private name(i: number): string {
    const q = this.q[i]
    return `tk${q === 255 ? '' : ` q${q}`}${i === this.selected ? ' at' : ''}`
  }

  /** Another metric: only the classes of what is drawn change. */
  recolour(metric: Metric): void {
    this.metric = metric
    this.q = classes(metric, this.tokens.arrays[metric.name], this.tokens.n)
    for (const [number, node] of this.drawn) {
      const start = this.chunks[number].start
      const spans = node.lastChild!.childNodes
      for (let k = 0; k < spans.length; k++) (spans[k] as HTMLElement).className = this.name(start + k)
    }
    this.moved()
  }

  select(i: number): void {
    const old = this.selected
    this.selected = i
    for (const at of [old, i]) {
      const node = this.span(at)
      if (node) node.className = this.name(at)
    }
  }

  private chunkOf(i: number): number {
    let low = 0
    let high = this.chunks.length - 1
    while (low < high) {
      const middle = (low + high + 1) >> 1
      if (this.chunks[middle].start <= i) low = middle
      else high = middle - 1
    }
    return low
  }

  span(i: number): HTMLElement | null {
    if (i < 0 || i >= this.tokens.n) return null
    const number = this.chunkOf(i)
    return (this.drawn.get(number)?.lastChild?.childNodes[i - this.chunks[number].start] as HTMLElement | undefined) ?? null
  }

  /** Bring a token into sight, near the middle where it was far. */
  reveal(i: number): void {
    if (i < 0 || i >= this.tokens.n) return
    const number = this.chunkOf(i)
    if (!this.drawn.has(number)) {
      // Measuring what comes into sight moves what is below it, so look again until it stands still.
      for (let look = 0; look < 4 && !this.drawn.has(number); look++) {
        this.scroller.scrollTop = Math.max(0, this.heights.top(number) - this.scroller.clientHeight / 3)
        this.draw()
      }
    }
    const node = this.span(i)
    if (!node) return
    const at = node.getBoundingClientRect()
    const here = this.scroller.getBoundingClientRect()
    if (at.top < here.top + 24 || at.bottom > here.bottom - 24) {
      this.scroller.scrollTop += at.top - here.top - this.scroller.clientHeight * 0.4
      this.draw()
    }
  }

  /** The token that a mouse event is on, −1 for none. */
  under(target: EventTarget | null): number {
    const node = target as HTMLElement | null
    if (!node?.classList?.contains('tk')) return -1
    const chunk = node.closest('.tk-chunk')
    for (const [number, drawn] of this.drawn) {
      if (drawn === chunk) return this.chunks[number].start + Array.prototype.indexOf.call(node.parentNode!.childNodes, node)
    }
    return -1
  }

  /** The next token after `from` (or before, with a negative `way`) that `wanted` accepts, −1 for none. */
  find(from: number, way: 1 | -1, wanted: (i: number, q: number) => boolean): number {
    for (let i = from + way; i >= 0 && i < this.tokens.n; i += way) if (wanted(i, this.q[i])) return i
    return -1
  }

  /** The minimap: a strip of roles, then for each line of pixels the loudest class that stands there. */
  paint(canvas: HTMLCanvasElement, ratio: number, roles: Record<string, string>, colours: string[]): void {
    const height = Math.round(canvas.clientHeight * ratio)
    const width = Math.round(canvas.clientWidth * ratio)
    if (canvas.height !== height || canvas.width !== width) {
      canvas.height = height
      canvas.width = width
    }
    const context = canvas.getContext('2d')
    if (!context) return
    context.clearRect(0, 0, width, height)
    const scale = height / (this.heights.total + 24)
    const loud = new Int8Array(height).fill(-1)
    const middle = this.metric.kind === 'div' ? 4 : 0
    let top = 0
    this.chunks.forEach((chunk, number) => {
      const tall = this.heights.get(number)
      const block = this.tokens.blocks[chunk.block]
      context.fillStyle = roles[block.origin === 'sampled' ? 'sampled' : block.origin === 'template' ? 'template' : block.role === 'tool' ? 'tool' : 'user']
      context.fillRect(0, top * scale, 4 * ratio, Math.max(1, tall * scale - 0.5))
      const each = tall / Math.max(1, chunk.stop - chunk.start)
      for (let i = chunk.start; i < chunk.stop; i++) {
        const q = this.q[i]
        if (q === 255) continue
        const from = Math.min(height - 1, Math.floor((top + (i - chunk.start) * each) * scale))
        const to = Math.min(height, Math.max(from + 1, Math.floor((top + (i - chunk.start + 1) * each) * scale)))
        for (let y = from; y < to; y++) if (loud[y] < 0 || Math.abs(q - middle) > Math.abs(loud[y] - middle)) loud[y] = q
      }
      top += tall
    })
    for (let y = 0; y < height; y++) {
      if (loud[y] >= 0 && colours[loud[y]]) {
        context.fillStyle = colours[loud[y]]
        context.fillRect(6 * ratio, y, width - 6 * ratio, 1)
      }
    }
  }

  get total(): number {
    return this.heights.total + 24
  }
}
