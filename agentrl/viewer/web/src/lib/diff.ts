/** Differences of two texts: lines first, then words within changed lines. Myers' greedy algorithm, bounded. */
export type Op = 'same' | 'del' | 'add'
export interface Edit<T> {
  op: Op
  items: T[]
}

/** Above this many edits a diff says nothing that "all of it changed" does not. */
const LIMIT = 1500

export function diff<T>(a: T[], b: T[]): Edit<T>[] {
  let head = 0
  while (head < a.length && head < b.length && a[head] === b[head]) head++
  let tail = 0
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++
  const out: Edit<T>[] = []
  push(out, 'same', a.slice(0, head))
  for (const edit of middle(a.slice(head, a.length - tail), b.slice(head, b.length - tail))) push(out, edit.op, edit.items)
  push(out, 'same', a.slice(a.length - tail))
  return out
}

function push<T>(out: Edit<T>[], op: Op, items: T[]): void {
  if (!items.length) return
  const last = out.at(-1)
  if (last?.op === op) last.items.push(...items)
  else out.push({ op, items: [...items] })
}

function middle<T>(a: T[], b: T[]): Edit<T>[] {
  const whole: Edit<T>[] = []
  push(whole, 'del', a)
  push(whole, 'add', b)
  if (!a.length || !b.length) return whole
  const most = Math.min(LIMIT, a.length + b.length)
  const at = new Map<number, number>([[1, 0]])
  const trace: Map<number, number>[] = []
  for (let d = 0; d <= most; d++) {
    trace.push(new Map(at))
    for (let k = -d; k <= d; k += 2) {
      let x = k === -d || (k !== d && (at.get(k - 1) ?? -1) < (at.get(k + 1) ?? -1)) ? at.get(k + 1)! : at.get(k - 1)! + 1
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++
      at.set(k, x)
      if (x >= a.length && x - k >= b.length) return back(a, b, trace)
    }
  }
  return whole
}

function back<T>(a: T[], b: T[], trace: Map<number, number>[]): Edit<T>[] {
  const steps: [Op, T][] = []
  let x = a.length
  let y = b.length
  for (let d = trace.length - 1; d >= 0; d--) {
    const at = trace[d]
    const k = x - y
    const before = k === -d || (k !== d && (at.get(k - 1) ?? -1) < (at.get(k + 1) ?? -1)) ? k + 1 : k - 1
    const fromX = d === 0 ? 0 : at.get(before)!
    const fromY = d === 0 ? 0 : fromX - before
    while (x > fromX && y > fromY) steps.push(['same', a[--x]]), y--
    if (d > 0) {
      if (x > fromX) steps.push(['del', a[--x]])
      else if (y > fromY) steps.push(['add', b[--y]])
    }
  }
  const out: Edit<T>[] = []
  for (const [op, item] of steps.reverse()) push(out, op, [item])
  return out
}

export function words(text: string): string[] {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? []
}

/** The differences of two texts by words, or by lines where they are long. */
export function texts(a: string, b: string): Edit<string>[] {
  const long = a.length + b.length > 20_000
  const split = (text: string) => (long ? text.split(/(?<=\n)/) : words(text))
  return long ? diff(split(a), split(b)) : bridged(diff(split(a), split(b)))
}

/** Blanks between two changes belong to them: five changed words are one change, not five. */
function bridged(edits: Edit<string>[]): Edit<string>[] {
  const out: Edit<string>[] = []
  let del: string[] = []
  let add: string[] = []
  const flush = () => {
    push(out, 'del', del)
    push(out, 'add', add)
    del = []
    add = []
  }
  edits.forEach((edit, i) => {
    if (edit.op === 'del') del.push(...edit.items)
    else if (edit.op === 'add') add.push(...edit.items)
    else if (del.length + add.length && i < edits.length - 1 && /^[^\S\n]+$/.test(edit.items.join(''))) {
      del.push(...edit.items)
      add.push(...edit.items)
    } else {
      flush()
      push(out, 'same', edit.items)
    }
  })
  flush()
  return out
}
