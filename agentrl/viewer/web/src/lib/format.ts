/** Numbers and times as people read them. Every missing value is an en dash. */
import type { Num } from './types'

const NONE = '–'

/** Four significant digits at most; exponents only where zeros would hide the number. */
export function num(value: Num | undefined, digits = 3): string {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE
  if (!Number.isFinite(value)) return value > 0 ? '∞' : '−∞'
  const size = Math.abs(value)
  if (size === 0) return '0'
  if (Number.isInteger(value) && size < 1e6) return sign(value.toLocaleString('en').replaceAll(',', '\u2009'))
  if (size >= 1e6) return sign(`${trim((value / 10 ** (size >= 1e9 ? 9 : 6)).toFixed(2))}${size >= 1e9 ? 'G' : 'M'}`)
  if (size >= 1000) return sign(Math.round(value).toLocaleString('en').replaceAll(',', '\u2009'))
  if (size < 0.001) return sign(value.toExponential(1).replace('e-', 'e−'))
  return sign(trim(value.toPrecision(digits)))
}

function trim(text: string): string {
  return text.includes('.') && !text.includes('e') ? text.replace(/0+$/, '').replace(/\.$/, '') : text
}

function sign(text: string): string {
  return text.startsWith('-') ? `−${text.slice(1)}` : text
}

/** With a plus sign, for differences. */
export function signed(value: Num | undefined, digits = 3): string {
  return value !== null && value !== undefined && value > 0 ? `+${num(value, digits)}` : num(value, digits)
}

export function fixed(value: Num | undefined, places = 2): string {
  return value === null || value === undefined || Number.isNaN(value) ? NONE : sign(value.toFixed(places))
}

export function percent(value: Num | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE
  return `${(value * 100).toFixed(value === 0 || value === 1 ? 0 : 1)}\u2009%`
}

export function seconds(value: Num | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE
  if (value < 0.0005) return '0\u2009s'
  if (value < 1) return `${Math.round(value * 1000)}\u2009ms`
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)}\u2009s`
  const whole = Math.round(value)
  if (whole < 3600) return `${Math.floor(whole / 60)}\u2009m ${String(whole % 60).padStart(2, '0')}\u2009s`
  return `${Math.floor(whole / 3600)}\u2009h ${String(Math.floor((whole % 3600) / 60)).padStart(2, '0')}\u2009m`
}

export function ago(stamp: Num | undefined, now: number): string {
  if (!stamp) return NONE
  const past = now - stamp
  if (past < 60) return 'just now'
  if (past < 3600) return `${Math.floor(past / 60)} min ago`
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`
  if (past < 86400 * 14) return `${Math.floor(past / 86400)} d ago`
  return new Date(stamp * 1000).toISOString().slice(0, 10)
}

export function bytes(length: number): string {
  if (length < 1000) return `${length} characters`
  return length < 1e6 ? `${(length / 1e3).toFixed(0)}k characters` : `${(length / 1e6).toFixed(1)}M characters`
}

export function plural(count: number, one: string, many = `${one}s`): string {
  return `${num(count)}\u00a0${count === 1 ? one : many}`
}

/** The end of a long id, which tells siblings apart. */
export function tail(id: string, size = 28): string {
  return id.length <= size ? id : `…${id.slice(-size + 1)}`
}

export function outcome(kind: string, why: string | null): string {
  return why ? `${kind} · ${why}` : kind
}
