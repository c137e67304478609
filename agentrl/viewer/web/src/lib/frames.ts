/** Screens of an episode in order, each with the click that was decided on while it was seen. */
import type { Tool, Turn } from './types'

export interface Frame {
  sha: string
  turn: number
  /** What was done next, seeing this screen. */
  action: { turn: number; name: string; arguments: any } | null
  x: number | null
  y: number | null
}

const image = (tool: Tool): string[] => tool.result.images ?? []

/** x and y of a call, from its own arguments or from `xy`, `coordinate`, `point` pairs. */
export function point(args: any): [number, number] | null {
  if (!args || typeof args !== 'object') return null
  const number = (v: unknown) => (typeof v === 'number' && Number.isFinite(v) ? v : null)
  const x = number(args.x)
  const y = number(args.y)
  if (x !== null && y !== null) return [x, y]
  for (const name of ['xy', 'coordinate', 'coordinates', 'point', 'position', 'start_box']) {
    const pair = args[name]
    if (Array.isArray(pair) && number(pair[0]) !== null && number(pair[1]) !== null) return [pair[0], pair[1]]
  }
  return null
}

export function frames(turns: Turn[]): Frame[] {
  const out: Frame[] = []
  const steps: { turn: number; tool: Tool | null; images: string[] }[] = []
  for (const turn of turns) {
    if (turn.images?.length) steps.push({ turn: turn.index, tool: null, images: turn.images })
    for (const tool of turn.tools) steps.push({ turn: turn.index, tool, images: image(tool) })
  }
  steps.forEach((step, i) => {
    step.images.forEach((sha, k) => {
      const next = k === step.images.length - 1 ? steps.slice(i + 1).find((s) => s.tool) : undefined
      const at = next?.tool ? point(next.tool.arguments) : null
      out.push({ sha, turn: step.turn, action: next?.tool ? { turn: next.turn, name: next.tool.name, arguments: next.tool.arguments } : null, x: at?.[0] ?? null, y: at?.[1] ?? null })
    })
  })
  return out
}

/** A point as shares of the picture: pixels, thousandths or shares already, told apart by size. */
export function share(x: number, y: number, width: number, height: number): [number, number] | null {
  if (!(width > 0 && height > 0)) return null
  let scaleX = width
  let scaleY = height
  if (x >= 0 && y >= 0 && x <= 1 && y <= 1 && !(Number.isInteger(x) && Number.isInteger(y))) scaleX = scaleY = 1
  else if (x > width || y > height) scaleX = scaleY = 1000
  const at: [number, number] = [x / scaleX, y / scaleY]
  return at.every((v) => v >= 0 && v <= 1) ? at : null
}
