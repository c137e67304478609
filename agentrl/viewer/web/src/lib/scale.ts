/** How a token's number becomes a colour class: q0 (calm) to q8 (loud), or none where there is no number.
 *
 * Three scales, each safe for colour-blind readers: `seq` grows in one hue, `div` goes from orange through the page's
 * own colour to blue, `cat` cycles through eight distinct hues. Classes, never inline colours: see docs/viewer.md.
 */
export type Kind = 'seq' | 'div' | 'cat'

export interface Metric {
  name: string
  label: string
  key: string
  kind: Kind
  help: string
  /** The class of a value, 0…8. */
  q: (value: number) => number
  /** The ends of the legend, in words. */
  ends: [string, string]
}

/** The index of the first edge above `value`. */
export function step(edges: readonly number[], value: number): number {
  let at = 0
  while (at < edges.length && value >= edges[at]) at++
  return at
}

const SURPRISE = [0.02, 0.1, 0.3, 0.7, 1.5, 3, 5, 8]
const ENTROPY = [0.02, 0.1, 0.3, 0.6, 1, 1.7, 2.5, 3.5]
const RATIO = [-0.4, -0.15, -0.05, -0.01, 0.01, 0.05, 0.15, 0.4]
const ADVANTAGE = [-1.5, -0.8, -0.3, -0.02, 0.02, 0.3, 0.8, 1.5]
const SHARE = [0.05, 0.25, 0.5, 0.75, 0.999, 1.001, 1.5, 2.5]
const AGE = [0.5, 1.5, 2.5, 3.5, 4.5, 6.5, 9.5, 16.5]

export const METRICS: readonly Metric[] = [
  { name: 'logprob', label: 'log-prob', key: '1', kind: 'seq', help: 'how surprising the token was: −log p under the engine', q: (v) => step(SURPRISE, -v), ends: ['certain', 'p < e⁻⁸'] },
  { name: 'entropy', label: 'entropy', key: '2', kind: 'seq', help: 'how open the choice was, in nats', q: (v) => step(ENTROPY, v), ends: ['0', '> 3.5 nats'] },
  { name: 'ratio', label: 'ratio', key: '3', kind: 'div', help: 'trainer against engine or old policy: π/π_old', q: (v) => step(RATIO, Math.log(v)), ends: ['< 0.67', '> 1.5'] },
  { name: 'advantage', label: 'advantage', key: '4', kind: 'div', help: 'the credit that the token trains with', q: (v) => step(ADVANTAGE, v), ends: ['< −1.5', '> 1.5'] },
  { name: 'weight', label: 'weight', key: '5', kind: 'seq', help: 'what the loss multiplies the token by', q: (v) => step(SHARE, v), ends: ['0', '> 2.5'] },
  { name: 'version', label: 'weight version', key: '6', kind: 'cat', help: 'which weights sampled the token', q: (v) => (v < 0 ? -1 : v % 8), ends: ['', ''] },
  { name: 'trained', label: 'trained', key: '7', kind: 'cat', help: 'looked at by the loss, or not', q: (v) => (v > 0 ? 0 : 8), ends: ['trained', 'not trained'] },
  { name: 'mask', label: 'sampled', key: '7', kind: 'cat', help: 'sampled by the policy, or not; what was trained is not recorded here', q: (v) => (v > 0 ? 0 : 8), ends: ['sampled', 'not sampled'] },
  { name: 'age', label: 'age', key: '8', kind: 'seq', help: 'how many updates behind the trainer the token was', q: (v) => (v < 0 ? -1 : step(AGE, v)), ends: ['0', '> 16'] },
]

/** The metrics of one answer: whether tokens were trained where that was recorded, else whether they were sampled. */
export function metricsOf(arrays: Record<string, unknown> | undefined): readonly Metric[] {
  const other = arrays?.trained ? 'mask' : 'trained'
  return METRICS.filter((m) => m.name !== other)
}

export const PLAIN: Metric = { name: 'none', label: 'plain', key: '0', kind: 'seq', help: 'no colour', q: () => -1, ends: ['', ''] }

/** The class number of a value under a metric, −1 where it has none. */
export function classOf(metric: Metric, value: number): number {
  return Number.isNaN(value) ? -1 : metric.q(value)
}

/** Class numbers of a whole array, as bytes; 255 is none. One pass, so that a switch is one frame. */
export function classes(metric: Metric, values: ArrayLike<number> | undefined, n: number): Uint8Array {
  const out = new Uint8Array(n).fill(255)
  if (!values) return out
  for (let i = 0; i < n; i++) {
    const q = classOf(metric, values[i])
    if (q >= 0) out[i] = q
  }
  return out
}
