/** Metric names to panels: what belongs together stands together; what is new gets a panel of its own kind. */
import type { Line } from './types'

export interface Panel {
  title: string
  unit: string
  names: string[]
}
export interface Section {
  title: string
  panels: Panel[]
}
export interface Series {
  x: number[]
  y: (number | null)[]
  lines: number[]
}

const LAYOUT: [string, [string, string, RegExp][]][] = [
  ['Outcome', [
    ['Reward', '', /^reward$/],
    ['Success', '', /^success$/],
    ['Evaluation: success', '', /^eval\/[^/]+\/success$/],
    ['Evaluation: reward', '', /^eval\/[^/]+\/mean_reward$/],
    ['Reward spread', '', /^reward_std$/],
    ['Reward parts', '', /^(part|parts|reward)\//],
  ]],
  ['Behaviour', [
    ['Tool calls', 'per episode', /^tool_calls$/],
    ['Tool cost', 'per episode', /^tool_cost$/],
    ['Tokens', 'per episode', /^tokens$/],
    ['Turns', 'per episode', /^turns$/],
    ['Errors', 'per episode', /^(parse_errors|tool_errors)$/],
    ['Truncated and missing', 'share', /^(truncated|missing)$/],
    ['Groups', '', /^groups(_\w+)?$/],
    ['Evaluation: calls and tokens', '', /^eval\/[^/]+\/(tool_calls|tokens)$/],
  ]],
  ['Optimisation', [
    ['Entropy', 'nats', /^entropy$/],
    ['KL', '', /^(approx_)?kl($|\/)/],
    ['Ratio', '', /^ratio$/],
    ['Clip fraction', '', /^clip_fraction/],
    ['Loss', '', /^(loss|nll)$/],
    ['Gradient norm', '', /^grad_norm$/],
    ['Learning rate', '', /^lr$/],
    ['Staleness', 'updates', /^(age|staleness|lag)/],
  ]],
  ['Engine and trainer', [
    ['Gap: KL', '', /^gap\/kl$/],
    ['Gap: absolute', 'nats', /^gap\/(mean|max)_abs$/],
    ['Gap: other', '', /^gap\//],
  ]],
  ['Throughput and time', [
    ['Seconds of a step', 's', /^time\//],
    ['Engine tokens', 'tokens', /^speed\/engine_(output|prompt|cached)_tokens$/],
    ['Episodes a second', '1/s', /^speed\/episodes_s$/],
    ['Tokens a second', '1/s', /^speed\/.*tok_s$/],
    ['Trained tokens', 'per step', /^train_tokens$/],
    ['Speed: other', '', /^speed\//],
  ]],
]

const PLAIN = new Set(['stage', 'step', 'time'])

export function names(lines: Line[]): string[] {
  const found = new Set<string>()
  for (const line of lines) for (const name in line) if (!PLAIN.has(name) && typeof line[name] === 'number') found.add(name)
  return [...found].sort()
}

export function sections(all: string[]): Section[] {
  const left = new Set(all)
  const out: Section[] = []
  for (const [title, panels] of LAYOUT) {
    const here: Panel[] = []
    for (const [name, unit, wanted] of panels) {
      const got = all.filter((n) => left.has(n) && wanted.test(n))
      got.forEach((n) => left.delete(n))
      if (got.length) here.push({ title: name, unit, names: got })
    }
    if (here.length) out.push({ title, panels: here })
  }
  if (left.size) out.push({ title: 'Other', panels: [...left].map((n) => ({ title: n, unit: '', names: [n] })) })
  return out
}

/** One metric over steps. A step that was repeated after a resume counts once, with its last number. */
export function series(lines: Line[], name: string, stage: string | null): Series {
  const at = new Map<number, [number, number]>()
  lines.forEach((line, i) => {
    const value = line[name]
    if (typeof value === 'number' && (stage === null || line.stage === stage || line.stage === `${stage}-eval`)) at.set(line.step, [value, i])
  })
  const steps = [...at.keys()].sort((a, b) => a - b)
  return { x: steps, y: steps.map((s) => (Number.isFinite(at.get(s)![0]) ? at.get(s)![0] : null)), lines: steps.map((s) => at.get(s)![1]) }
}

/** Exponential moving average without the bias of its start; gaps stay gaps. `weight` 0 is the data itself. */
export function smooth(values: (number | null)[], weight: number): (number | null)[] {
  if (weight <= 0) return values
  let sum = 0
  let norm = 0
  return values.map((value) => {
    if (value === null) return null
    sum = sum * weight + value * (1 - weight)
    norm = norm * weight + (1 - weight)
    return sum / norm
  })
}

/** Several series over the union of their steps, as uPlot wants them. */
export function joined(all: Series[]): [number[], ...(number | null)[][]] {
  const x = [...new Set(all.flatMap((s) => s.x))].sort((a, b) => a - b)
  const at = new Map(x.map((step, i) => [step, i]))
  return [
    x,
    ...all.map((s) => {
      const y: (number | null)[] = new Array(x.length).fill(null)
      s.x.forEach((step, i) => (y[at.get(step)!] = s.y[i]))
      return y
    }),
  ]
}

/** Training stages in the order of their first line, without their evaluations. */
export function stages(lines: Line[]): string[] {
  return [...new Set(lines.map((line) => line.stage.replace(/-eval$/, '')))]
}

/** Round numbers from `low` to `high`, about `count` of them. A range too small for its own numbers gets one. */
export function ticks(low: number, high: number, count: number, whole = false): number[] {
  const span = high - low
  if (!(span > Math.max(Math.abs(low), Math.abs(high)) * 1e-9)) return [low]
  const raw = span / Math.max(1, count)
  const power = 10 ** Math.floor(Math.log10(raw))
  let step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) ?? 10)
  if (whole) step = Math.max(1, Math.round(step))
  const out: number[] = []
  const first = Math.ceil(low / step - 1e-6)
  const last = Math.min(first + 20, Math.floor(high / step + 1e-6))
  for (let k = first; k <= last; k++) out.push(Number((k * step).toPrecision(12)))
  return out.length ? out : [low]
}

/** Labels without the path parts that all of them share: `eval/greedy/success`, `eval/sampled/success` → greedy, sampled. */
export function briefly(labels: string[]): string[] {
  const split = labels.map((label) => label.split('/'))
  if (labels.length < 2) return labels
  while (split.every((p) => p.length > 1 && p[0] === split[0][0])) split.forEach((p) => p.shift())
  while (split.every((p) => p.length > 1 && p.at(-1) === split[0].at(-1))) split.forEach((p) => p.pop())
  return split.map((p) => p.join(' ').replaceAll('_', ' '))
}
