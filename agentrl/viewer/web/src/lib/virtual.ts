/** Heights of items in a long column, guessed first and measured later; a Fenwick tree finds what stands where. */
export class Heights {
  readonly n: number
  private tree: Float64Array
  private own: Float64Array

  constructor(guesses: ArrayLike<number>) {
    this.n = guesses.length
    this.own = new Float64Array(guesses)
    this.tree = new Float64Array(this.n + 1)
    for (let i = 0; i < this.n; i++) this.add(i, this.own[i])
  }

  private add(i: number, by: number): void {
    for (let at = i + 1; at <= this.n; at += at & -at) this.tree[at] += by
  }

  get(i: number): number {
    return this.own[i]
  }

  /** Returns by how much the item grew. */
  set(i: number, height: number): number {
    const grown = height - this.own[i]
    if (grown !== 0) {
      this.own[i] = height
      this.add(i, grown)
    }
    return grown
  }

  /** The top edge of item `i`: the sum of what stands above it. */
  top(i: number): number {
    let sum = 0
    for (let at = i; at > 0; at -= at & -at) sum += this.tree[at]
    return sum
  }

  get total(): number {
    return this.top(this.n)
  }

  /** The item at offset `y`, clamped to the column. */
  at(y: number): number {
    let i = 0
    let left = y
    let bit = 1
    while (bit << 1 <= this.n) bit <<= 1
    for (; bit; bit >>= 1) {
      const next = i + bit
      if (next <= this.n && this.tree[next] <= left) {
        i = next
        left -= this.tree[next]
      }
    }
    return Math.max(0, Math.min(this.n - 1, i))
  }

  /** Items [first, last) that touch the window, `over` pixels more on both sides. */
  window(top: number, height: number, over: number): [number, number] {
    if (this.n === 0) return [0, 0]
    return [this.at(Math.max(0, top - over)), this.at(top + height + over) + 1]
  }
}

/** Rows of one height: which are drawn. */
export function rows(count: number, top: number, height: number, row: number, over = 6): [number, number] {
  const first = Math.max(0, Math.floor(top / row) - over)
  return [Math.min(first, Math.max(0, count - 1)), Math.min(count, Math.ceil((top + height) / row) + over)]
}
