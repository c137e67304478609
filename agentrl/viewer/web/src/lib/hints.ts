/** What an environment's render hint asks for, read from the result's own text. Text in, cells out: never HTML. */
import type { Hint } from './types'

export interface Table {
  columns: string[]
  rows: string[][]
}

const cell = (value: unknown): string => (typeof value === 'string' ? value : value === null || value === undefined ? '' : JSON.stringify(value))

/** A table from the hint's rows, else from the text as JSON records, Markdown, TSV or CSV; null where it is none. */
export function table(hint: Hint, text: string): Table | null {
  if (hint.rows) return { columns: (hint.columns ?? []).map(cell), rows: hint.rows.map((row) => row.map(cell)) }
  const trimmed = text.trim()
  if (trimmed.startsWith('[')) {
    try {
      const records = JSON.parse(trimmed)
      if (Array.isArray(records) && records.length && records.every((r) => r && typeof r === 'object' && !Array.isArray(r))) {
        const columns = [...new Set(records.flatMap((r) => Object.keys(r)))]
        return { columns, rows: records.map((r) => columns.map((c) => cell(r[c]))) }
      }
    } catch {
      // not JSON after all
    }
  }
  const lines = trimmed.split(/\r?\n/)
  if (lines.length < 2) return null
  if (lines[0].startsWith('|')) {
    const split = (line: string) => line.replace(/^\||\|\s*$/g, '').split('|').map((c) => c.trim())
    return { columns: split(lines[0]), rows: lines.slice(1).filter((l) => !/^[\s|:-]+$/.test(l)).map(split) }
  }
  const mark = lines[0].includes('\t') ? '\t' : lines[0].includes(',') ? ',' : null
  if (mark === null) return null
  const split = (line: string) => (mark === '\t' ? line.split('\t') : csv(line))
  const columns = hint.columns?.map(cell) ?? split(lines[0])
  return { columns, rows: lines.slice(hint.columns ? 0 : 1).map(split) }
}

function csv(line: string): string[] {
  const out: string[] = []
  for (const found of line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^,]*))/g)) out.push(found[1] !== undefined ? found[1].replaceAll('""', '"') : found[2])
  return out
}

/** A board: the hint's cells, else the text's lines, one character a cell (or one word, where words are separated). */
export function board(hint: Hint, text: string): string[][] | null {
  if (hint.cells) return hint.cells.map((row) => row.map(cell))
  const lines = text.replace(/\s+$/, '').split('\n')
  if (!lines[0] || lines.length > 40 || lines.some((line) => line.length > 120)) return null
  const spaced = lines.every((line) => /^\S{1,3}( \S{1,3})+$/.test(line.trim()))
  return lines.map((line) => (spaced ? line.trim().split(/\s+/) : [...line]))
}

export type DiffLine = { op: 'same' | 'del' | 'add' | 'head'; text: string }

export function unified(text: string): DiffLine[] {
  return text.split('\n').map((line) => ({
    op: /^(\+\+\+|---|@@|diff |index )/.test(line) ? 'head' : line.startsWith('+') ? 'add' : line.startsWith('-') ? 'del' : 'same',
    text: line,
  }))
}
