import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { diff, texts } from '../src/lib/diff'
import { num, percent, seconds, signed } from '../src/lib/format'
import { frames, point, share } from '../src/lib/frames'
import { board, table, unified } from '../src/lib/hints'
import { after } from '../src/lib/live.svelte'
import { briefly, joined, sections, series, smooth, stages, ticks } from '../src/lib/metrics'
import { keyed, link, parse } from '../src/lib/route'
import { classes, METRICS, metricsOf, step } from '../src/lib/scale'
import { cut, parts, visible } from '../src/lib/text'
import { chunked, decode, lines, place, position, type Block } from '../src/lib/tokens'
import { layout } from '../src/lib/tree'
import { verdict } from '../src/lib/verdict'
import { Heights, rows } from '../src/lib/virtual'

const metric = (name: string) => METRICS.find((m) => m.name === name)!

function packed(odd = false): ArrayBuffer {
  const ids = new Int32Array([7, 8, 9, 7, 8])
  const logprob = new Float32Array([NaN, NaN, -0.5, -2, NaN])
  const mask = new Uint8Array([0, 0, 1, 1, 0])
  const blocks: Block[] = [
    { turn: 0, where: 'context', role: 'user', origin: 'template', actor: 'user', start: 0, stop: 2 },
    { turn: 0, where: 'output', role: 'assistant', origin: 'sampled', actor: 'policy', start: 2, stop: 4 },
    { turn: 0, where: 'output', role: 'assistant', origin: 'forced', actor: 'policy', start: 4, stop: 5 },
  ]
  const arrays = [
    { name: 'ids', dtype: 'i4', offset: 0, length: 5 },
    { name: 'logprob', dtype: 'f4', offset: 20, length: 5 },
    { name: 'mask', dtype: 'u1', offset: 40, length: 5 },
  ]
  let text = JSON.stringify({ blocks, n: 5, arrays, pieces: { 7: 'a', 8: '\ud83d\ude00', 9: '</script>' }, exact_entropy: true })
  while ((new TextEncoder().encode(text).length % 4 === 0) === odd) text += ' '
  const header = new TextEncoder().encode(text)
  const out = new Uint8Array(4 + header.length + 48)
  new DataView(out.buffer).setUint32(0, header.length, true)
  out.set(header, 4)
  const at = 4 + header.length
  out.set(new Uint8Array(ids.buffer), at)
  out.set(new Uint8Array(logprob.buffer), at + 20)
  out.set(mask, at + 40)
  return out.buffer
}

describe('token data', () => {
  it.each([false, true])('is decoded whether or not its arrays are aligned (%s)', (odd) => {
    const tokens = decode(packed(odd))
    expect([...tokens.ids]).toEqual([7, 8, 9, 7, 8])
    expect(tokens.arrays.logprob[3]).toBe(-2)
    expect([...tokens.arrays.mask]).toEqual([0, 0, 1, 1, 0])
    expect(tokens.pieces.get(9)).toBe('</script>')
    expect(tokens.exactEntropy).toBe(true)
  })
  it('that is cut short is refused', () => {
    expect(() => decode(packed().slice(0, 60))).toThrow(/cut short/)
    expect(() => decode(packed().slice(0, packed().byteLength - 20))).toThrow(/cut short in (logprob|mask)/)
    expect(() => decode(new ArrayBuffer(0))).toThrow(/empty/)
  })
  it('places and positions are inverse, and only for sampled tokens', () => {
    const tokens = decode(packed())
    expect(place(tokens, 3)).toEqual({ turn: 0, token: 1 })
    expect(position(tokens, 0, 1)).toBe(3)
    expect(place(tokens, 0)).toBeNull()
    expect(place(tokens, 4)).toBeNull()
    expect(position(tokens, 0, 2)).toBe(-1)
  })
  it('is cut into chunks that tile it, at line ends where they are near', () => {
    const blocks: Block[] = [{ turn: 0, where: 'context', role: 'user', origin: 'tool', actor: 'user', start: 0, stop: 1000 }]
    const piece = (i: number) => (i % 90 === 89 ? '.\n' : 'x')
    const chunks = chunked(blocks, piece, 300)
    expect(chunks[0].start).toBe(0)
    expect(chunks.at(-1)!.stop).toBe(1000)
    chunks.slice(1).forEach((c, i) => expect(c.start).toBe(chunks[i].stop))
    chunks.slice(0, -1).forEach((c) => expect(piece(c.stop - 1)).toContain('\n'))
    expect(chunks.filter((c) => c.head)).toHaveLength(1)
  })
  it('lines are counted as they wrap', () => {
    const of = (...all: string[]) => lines((i) => all[i], 0, all.length, 10)
    expect(of('12345', '67890')).toBe(1)
    expect(of('12345', '678901')).toBe(2)
    expect(of('a\n', 'b')).toBe(2)
  })
})

describe('scales', () => {
  it('step by edges', () => expect([0, 1, 5, 9].map((v) => step([1, 5], v))).toEqual([0, 1, 2, 2]))
  it('are monotone in how loud a token is', () => {
    const of = (name: string, values: number[]) => [...classes(metric(name), new Float32Array(values), values.length)]
    const surprise = of('logprob', [-0.001, -0.2, -1, -4, -20])
    expect(surprise).toEqual([...surprise].sort((a, b) => a - b))
    expect(surprise[0]).toBe(0)
    expect(surprise.at(-1)).toBe(8)
    expect(of('ratio', [1, 0.5, 2])).toEqual([4, 0, 8])
    expect(of('advantage', [0, -9, 9])).toEqual([4, 0, 8])
    expect(of('trained', [0, 1])).toEqual([8, 0])
  })
  it('call a token trained only where that was recorded', () => {
    const seventh = (arrays: object | undefined) => metricsOf(arrays as Record<string, unknown>).filter((m) => m.key === '7').map((m) => m.label)
    expect(seventh({ mask: [1], trained: [0] })).toEqual(['trained'])
    expect(seventh({ mask: [1] })).toEqual(['sampled'])
    expect(seventh(undefined)).toEqual(['sampled'])
    expect(metric('mask').help).not.toMatch(/trained by/)
  })
  it('leave tokens without a number without a class', () => {
    expect([...classes(metric('entropy'), new Float32Array([NaN]), 1)]).toEqual([255])
    expect([...classes(metric('version'), new Int32Array([-1, 9]), 2)]).toEqual([255, 1])
    expect([...classes(metric('entropy'), undefined, 2)]).toEqual([255, 255])
  })
  it('keep text legible on every colour, light and dark (4.5 : 1)', () => {
    const css = readFileSync(new URL('../src/app.css', import.meta.url), 'utf8')
    const light = (hex: string) => {
      const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
      return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const contrast = (a: string, b: string) => {
      const [x, y] = [light(a), light(b)].sort((p, q) => q - p)
      return (x + 0.05) / (y + 0.05)
    }
    const themes = [new Map<string, string>(), new Map<string, string>()]
    for (const block of css.matchAll(/(:root|\[data-theme='dark'\]) \{([^}]*)\}/g))
      for (const found of block[2].matchAll(/--([\w-]+): (#[0-9a-f]{6})/g)) themes[block[1] === ':root' ? 0 : 1].set(found[1], found[2])
    let pairs = 0
    for (const theme of themes) {
      for (const [name, text] of theme) {
        if (!/^(seq|div|cat)\d-t$/.test(name)) continue
        pairs++
        expect(contrast(text, theme.get(name.slice(0, -2))!), name).toBeGreaterThanOrEqual(4.5)
      }
      for (const ink of ['ink', 'ink-2', 'ink-3', 'accent', 'good', 'bad', 'warn'])
        for (const ground of ['bg', 'surface', 'sunk']) expect(contrast(theme.get(ink)!, theme.get(ground)!), `${ink} on ${ground}`).toBeGreaterThanOrEqual(4.5)
    }
    expect(pairs).toBe(48)
  })
})

describe('an explanation', () => {
  it('is called right only where it was checked', () => {
    expect(verdict({ adds_up: true, unchecked: null })).toEqual(['good', expect.stringContaining('✓')])
    expect(verdict({ adds_up: false, unchecked: null })[0]).toBe('bad')
    const [kind, text] = verdict({ adds_up: null, unchecked: 'the estimator is not the framework’s' })
    expect(kind).toBe('dim')
    expect(text).toBe('As recorded, not checked: the estimator is not the framework’s.')
    expect(verdict({ adds_up: null, unchecked: null })[1]).not.toContain('✓')
  })
})

describe('links', () => {
  it('survive a round trip with any id', () => {
    const id = 'rl-1/a&b=?#%/<script>/é\u202e 7'
    const back = parse(link('my run/é', 't', { id, turn: 0, token: 12, empty: '', none: null }))
    expect(back).toEqual({ page: 't', run: 'my run/é', query: { id, turn: '0', token: '12' } })
  })
  it('of the first pages are short', () => {
    expect(link(null, 'runs')).toBe('#/')
    expect(parse('')).toEqual({ page: 'runs', run: null, query: {} })
    expect(parse('#/r/x')).toEqual({ page: 'run', run: 'x', query: {} })
    expect(parse('#/r/%E0%A4%A/t').run).toBe('%E0%A4%A')
  })
  it('name runs by folder where that is unique', () => {
    const runs = [{ run: 'r0', folder: '/a/x' }, { run: 'r1', folder: '/b/x' }, { run: 'r2', folder: '/b/y/' }, { run: 'r3', folder: '/r9' }]
    expect(keyed(runs).map((r) => r.key)).toEqual(['r0', 'r1', 'y', 'r3'])
  })
})

describe('the virtualiser', () => {
  it('finds tops and items after heights changed', () => {
    const heights = new Heights([10, 20, 30, 40])
    expect([0, 1, 2, 3, 4].map((i) => heights.top(i))).toEqual([0, 10, 30, 60, 100])
    expect(heights.set(1, 50)).toBe(30)
    expect(heights.total).toBe(130)
    expect([0, 9, 10, 59, 60, 1e9].map((y) => heights.at(y))).toEqual([0, 0, 1, 1, 2, 3])
    expect(heights.window(15, 10, 0)).toEqual([1, 2])
    expect(new Heights([]).window(0, 100, 10)).toEqual([0, 0])
  })
  it('agrees with a plain sum on a thousand items', () => {
    const own = Array.from({ length: 1000 }, (_, i) => 1 + ((i * 7919) % 97))
    const heights = new Heights(own)
    for (const y of [0, 1, 333, 20_000, 47_000]) {
      let i = 0
      let top = 0
      while (i < own.length - 1 && top + own[i] <= y) top += own[i++]
      expect(heights.at(y)).toBe(i)
    }
  })
  it('draws about a screen of rows', () => {
    expect(rows(100_000, 34_000, 680, 34)).toEqual([994, 1026])
    expect(rows(0, 0, 680, 34)[1]).toBe(0)
  })
})

describe('differences', () => {
  const sides = <T>(edits: { op: string; items: T[] }[]) => [
    edits.filter((e) => e.op !== 'add').flatMap((e) => e.items),
    edits.filter((e) => e.op !== 'del').flatMap((e) => e.items),
  ]
  it('give both sides back', () => {
    for (const [a, b] of [['abcabba', 'cbabac'], ['', 'x'], ['same', 'same'], ['kitten', 'sitting']]) {
      expect(sides(diff([...a], [...b]))).toEqual([[...a], [...b]])
    }
    const [a, b] = ['The refunds come to 312.5 in all.', 'The two refunds come to 267 in all.']
    expect(sides(texts(a, b)).map((s) => s.join(''))).toEqual([a, b])
  })
  it('are the shortest, and blanks between changed words belong to the change', () => {
    expect(diff([...'abcabba'], [...'cbabac']).filter((e) => e.op !== 'same').flatMap((e) => e.items)).toHaveLength(5)
    expect(texts('one two three', 'uno dos tres').map((e) => e.op)).toEqual(['del', 'add'])
  })
})

describe('hostile text', () => {
  it('shows what hides', () => {
    expect(visible('a\u202eb\u0000\u001b[31m\n\ud800')).toBe('a‹RLO›b‹NUL›‹ESC›[31m⏎‹U+D800›')
    expect(parts('plain <b>')).toEqual([{ text: 'plain <b>', mark: false }])
    expect(visible('a\r\nb')).toBe('a\r⏎b')
    expect(parts('😀')).toHaveLength(1)
  })
  it('is cut at a line and never inside a character', () => {
    expect(cut('ab\ncd', 100)).toBe('ab\ncd')
    expect(cut('x'.repeat(9) + '\n' + 'y'.repeat(9), 11)).toBe('x'.repeat(9) + '\n')
    expect(cut('😀😀', 3)).toBe('😀')
  })
})

describe('render hints', () => {
  it('read tables of every writing', () => {
    for (const text of ['a\tb\n1\t2', 'a,b\n1,2', '| a | b |\n|---|---|\n| 1 | 2 |', '[{"a": 1, "b": "2"}]'])
      expect(table({ kind: 'table' }, text)).toEqual({ columns: ['a', 'b'], rows: [['1', '2']] })
    expect(table({ kind: 'table' }, 'nothing of the kind')).toBeNull()
    expect(table({ kind: 'table' }, 'a,b\n"x, ""y""",2')!.rows[0]).toEqual(['x, "y"', '2'])
  })
  it('read boards and diffs', () => {
    expect(board({ kind: 'board' }, '# .\n. #')).toEqual([['#', '.'], ['.', '#']])
    expect(board({ kind: 'board' }, 'ab\ncd')).toEqual([['a', 'b'], ['c', 'd']])
    expect(unified('@@ 1\n-a\n+b\n c').map((l) => l.op)).toEqual(['head', 'del', 'add', 'same'])
  })
})

describe('curves', () => {
  const line = (step: number, more: object, stage = 'rl') => ({ stage, step, time: step, ...more }) as any
  it('group names, and lose none', () => {
    const all = ['reward', 'success', 'speed/x', 'gap/kl', 'odd', 'time/rollout', 'time/update', 'eval/greedy/success']
    const found = sections(all)
    expect(found.flatMap((s) => s.panels.flatMap((p) => p.names)).sort()).toEqual([...all].sort())
    expect(found.at(-1)).toEqual({ title: 'Other', panels: [{ title: 'odd', unit: '', names: ['odd'] }] })
  })
  it('count a repeated step once, with its last number', () => {
    const found = series([line(2, { r: 5 }), line(1, { r: 1 }), line(2, { r: 7 }), line(3, { r: NaN }), line(1, { r: 9 }, 'sft')], 'r', 'rl')
    expect(found.x).toEqual([1, 2, 3])
    expect(found.y).toEqual([1, 7, null])
  })
  it('smooth without a biased start, keep gaps, and join over all steps', () => {
    expect(smooth([4, null, 4], 0.9)).toEqual([4, null, 4])
    expect(smooth([0, 1], 0.5)[1]).toBeCloseTo(2 / 3)
    expect(joined([{ x: [1, 3], y: [1, 3], lines: [] }, { x: [2], y: [9], lines: [] }])).toEqual([[1, 2, 3], [1, null, 3], [null, 9, null]])
    expect(stages([line(1, {}, 'sft'), line(1, {}), line(1, {}, 'rl-eval')])).toEqual(['sft', 'rl'])
  })
  it('have round ticks, also where the range is too small for its numbers', () => {
    expect(ticks(0, 1, 4)).toEqual([0, 0.25, 0.5, 0.75, 1])
    expect(ticks(0.3, 9.2, 3, true)).toEqual([5])
    expect(ticks(1e-14, 1e-14, 4)).toHaveLength(1)
    expect(ticks(1, 1 + 1e-13, 4)).toHaveLength(1)
    expect(ticks(1e-14, 3e-14, 4).length).toBeLessThan(12)
  })
  it('name lines by what tells them apart', () => expect(briefly(['eval/greedy/success', 'eval/sampled/success'])).toEqual(['greedy', 'sampled']))
})

describe('screens', () => {
  const shot = (sha: string, args: any = {}) => ({ name: 'click', arguments: args, id: '', hint: null, result: { text: '', ok: true, error: null, seconds: 0, cost: 0, images: [sha] } })
  it('carry the click that was decided on while they were seen', () => {
    const turns = [{ index: 0, tools: [shot('a')] }, { index: 1, tools: [shot('b', { x: 5, y: 6 })] }] as any
    expect(frames(turns).map((f) => [f.sha, f.x, f.y])).toEqual([['a', 5, 6], ['b', null, null]])
  })
  it('read points of every writing', () => {
    expect(point({ xy: [1, 2] })).toEqual([1, 2])
    expect(point({ coordinate: ['1', 2] })).toBeNull()
    expect(share(320, 200, 640, 400)).toEqual([0.5, 0.5])
    expect(share(0.25, 0.5, 640, 400)).toEqual([0.25, 0.5])
    expect(share(900, 500, 640, 400)).toEqual([0.9, 0.5])
    expect(share(4000, 500, 640, 400)).toBeNull()
  })
})

describe('the tree', () => {
  const node = (id: string, parent: string | null, turn = 0, run: string | null = null) => ({ id, parent, key: `${run ?? ''} ${id}`, under: parent && ` ${parent}`, run, turn, token: 0, reward: 0, advantage: 0, turns: [] })
  it('puts each branch under its parent, the latest first', () => {
    const found = layout([node('a', null), node('a.1', 'a', 1), node('a.2', 'a', 2), node('b', null)])
    expect(found.map((p) => p.node.id)).toEqual(['a', 'a.2', 'a.1', 'b'])
    expect(found[2].parentRow).toBe(0)
  })
  it('tells apart two forks of one turn, which have the same id', () => {
    const found = layout([node('a', null), node('a.1', 'a', 1, 'r1'), node('a.1', 'a', 1, 'r2')])
    expect(found.map((p) => [p.node.run, p.parentRow])).toEqual([[null, null], ['r1', 0], ['r2', 0]])
  })
  it('shows every trajectory once, also orphans and rings', () => {
    const found = layout([node('x', 'gone'), node('p', 'q'), node('q', 'p')])
    expect(found.map((p) => p.node.id).sort()).toEqual(['p', 'q', 'x'])
  })
})

describe('numbers', () => {
  it('read as people write them', () => {
    expect([num(null), num(0), num(1234567), num(-0.5), num(0.00001234), num(12345.6)]).toEqual(['–', '0', '1.23M', '−0.5', '1.2e−5', '12\u2009346'])
    expect([signed(0.25), signed(-3.75), percent(1), percent(0.9612)]).toEqual(['+0.25', '−3.75', '100\u2009%', '96.1\u2009%'])
    expect([seconds(0.0421), seconds(5.004), seconds(101), seconds(3725)]).toEqual(['42\u2009ms', '5.00\u2009s', '1\u2009m 41\u2009s', '1\u2009h 02\u2009m'])
  })
})

describe('metrics of a run at work', () => {
  const line = (step: number, reward: number) => ({ stage: 'rl', step, time: 0, reward })
  const news = (lines: ReturnType<typeof line>[], reset = false) => ({ lines, reset, entries: [], flights: null, status: null, missed: 0 })
  it('are appended, and begin anew where a resume took some back', () => {
    const known = [line(1, 0), line(2, 0)]
    expect(after(known, news([]))).toBe(known)
    expect(after(known, news([line(3, 0)])).map((l) => l.step)).toEqual([1, 2, 3])
    expect(after(known, news([line(1, 0)], true))).toEqual([line(1, 0)])
    expect(after(known, news([], true))).toEqual([])
  })
})
